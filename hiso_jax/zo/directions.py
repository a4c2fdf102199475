"""Keys → raw perturbations → search directions z = H^{-1/2} ⊙ u (HiSo, arXiv 2506.02370, Algorithm 1).

Everything here is made leaf by leaf: a direction is never needed whole, and a leaf's numbers depend on nothing
but its key, so that any party, device or layer can make just the part that it holds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Key, PyTree, Shaped

from hiso_jax.zo.pin import pin

Sampler = Callable[[Any, Sequence[int], Any], Array]
"""A family of raw perturbations: (leaf key, shape, dtype) → u with E[u uᵀ] = I."""


def _is_partitioned() -> bool:
    """Whether the program being traced leaves a mesh axis to the partitioner."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return any(kind == AxisType.Auto and size > 1 for kind, size in sizes)


def _normal(key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Array:
    """``jax.random.normal``, to the bit, in the layout that suits the program.

    Drawn flat, XLA compiles the counters four times faster, without the index arithmetic of several axes, and no
    slower code comes out. But a flat draw cannot be split along an axis of ``shape``: where the partitioner is at
    work the draw has its shape, and each device makes its own part.
    """
    if _is_partitioned():
        return jax.random.normal(key, shape, dtype)
    return jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)


def gaussian(key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Array:
    """Standard normal perturbations, the family of MeZO, DeComFL and HiSo."""
    return _normal(key, shape, dtype)


def rademacher(key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Array:
    """Random signs ±1 (SPSA, Spall 1992): made of integers, hence the same on every backend.

    The signs are unpacked 32 to a random word, where ``jax.random.rademacher`` spends a word on each.
    """
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 32),), jnp.uint32)
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return (1 - 2 * bits.astype(jnp.int8)).reshape(-1)[:size].reshape(shape).astype(dtype)


def sphere(key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Array:
    """Uniform on the sphere of radius √d_leaf, so that E[u uᵀ] = I holds leaf by leaf."""
    normal = _normal(key, shape, dtype)
    return normal * (math.sqrt(normal.size) / jnp.linalg.norm(normal))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Directions:
    """Which directions an optimizer state expects; a pytree without leaves, so it travels inside the state.

    Attributes:
      sampler: the family of raw perturbations.
      shaped: whether the raw perturbations are shaped by a curvature (HiSo) or used as they are (DeComFL).
    """

    sampler: Sampler
    shaped: bool


def perturbation_key(round_key: Key[Array, ""], step: ArrayLike, index: ArrayLike) -> Key[Array, ""]:
    """The key of perturbation ``index`` of local step ``step``: two nested ``jax.random.fold_in``.

    Args:
      round_key: the key of the round, a typed scalar key.
      step: local step k, 0 ≤ k < K.
      index: perturbation p, 0 ≤ p < P.
    """
    return jax.random.fold_in(jax.random.fold_in(round_key, step), index)


def working_dtype(leaf: Array) -> jnp.dtype:
    """The dtype of draws, curvature and updates of ``leaf``: promote_types(leaf dtype, float32)."""
    return jnp.promote_types(leaf.dtype, jnp.float32)


def direction(
    key: Key[Array, ""],
    params: PyTree[Shaped[Array, "..."]],
    curvature: PyTree[Shaped[Array, "..."]] | None = None,
    sampler: Sampler | None = None,
) -> PyTree[Shaped[Array, "..."]]:
    """One search direction z = H^{-1/2} ⊙ u (HiSo, Algorithm 1), in the structure of ``params``.

    Args:
      key: a perturbation key; leaf i of ``jax.tree.leaves(params)`` draws from ``fold_in(key, i)``.
      params: the trainable parameters; only their shapes and dtypes are read.
      curvature: H in the structure of ``params``, or None for H = 1.
      sampler: the family of raw perturbations; None means :func:`gaussian`.

    Returns:
      z with the shapes of ``params``, in :func:`working_dtype`.
    """
    draw = gaussian if sampler is None else sampler
    leaves = jax.tree.leaves(params)
    # Pinned: XLA would move the constant factors of a draw into the products it later enters, here and not there.
    z = [
        pin(draw(jax.random.fold_in(key, i), leaf.shape, working_dtype(leaf)).astype(working_dtype(leaf)))
        for i, leaf in enumerate(leaves)
    ]
    if curvature is not None:
        # A square root and a division, each correctly rounded, so that H = 1 returns u to the last bit and HiSo at
        # decay 1 is DeComFL exactly. Without the inner pin XLA makes of them u · rsqrt(h), which is approximate.
        z = [pin(u / pin(jnp.sqrt(h))) for u, h in zip(z, jax.tree.leaves(curvature), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), z)


def perturb(
    params: PyTree[Shaped[Array, "..."]], z: PyTree[Shaped[Array, "..."]], scale: ArrayLike
) -> PyTree[Shaped[Array, "..."]]:
    """``params + scale · z``, added in the wider dtype and then cast to the parameters' own."""
    return jax.tree.map(lambda x, u: (x.astype(u.dtype) + scale * u).astype(x.dtype), params, z)
