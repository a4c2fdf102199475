"""Keys → raw perturbations → search directions z = H^{-1/2} ⊙ u (HiSo, arXiv 2506.02370, Algorithm 1).

The only place that knows which key a direction has.

Everything here is made leaf by leaf: a direction is never needed whole, and a leaf's numbers depend on nothing
but its key, so that any party, device or layer can make just the part that it holds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Key, PyTree, Shaped, UInt32

from hiso_jax.checks import whole
from hiso_jax.stacked import Layers, Stacked, is_stacked
from hiso_jax.zo.partitioned import is_partitioned, split_as
from hiso_jax.zo.threefry import drawn
from hiso_jax.zo.walls import pin

Sampler = Callable[[Any, Sequence[int], Any], Array]
"""A family of raw perturbations: (leaf key, shape, dtype) → u with E[u uᵀ] = I."""


def _normal(key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Array:
    """``jax.random.normal``, to the bit, in the layout that suits the program."""

    def draw(own: Any, own_shape: Sequence[int]) -> Array:
        return jax.random.normal(own, own_shape, dtype)

    # A flat draw cannot be split along an axis of ``shape``: under a partitioner each device makes its own part.
    return draw(key, shape) if is_partitioned() else drawn(draw, key, shape)


def _words(key: Any, shape: Sequence[int]) -> UInt32[Array, "..."]:
    return jax.random.bits(key, shape, jnp.uint32)


def random_words(key: Key[Array, ""], shape: Sequence[int]) -> UInt32[Array, "..."]:
    """``jax.random.bits`` of 32, to the bit, in the layout that suits the program."""
    return _words(key, shape) if is_partitioned() else drawn(_words, key, shape)


def gaussian(key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Array:
    """Standard normal perturbations, the family of MeZO, DeComFL and HiSo."""
    return _normal(key, shape, dtype)


def rademacher(key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Array:
    """Random signs ±1 (SPSA, Spall 1992): made of integers, hence the same on every backend.

    The signs are unpacked 32 to a random word, where ``jax.random.rademacher`` spends a word on each.
    """
    size = math.prod(shape)
    words = drawn(_words, key, (-(-size // 32),))
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return (1 - 2 * bits.astype(jnp.int8)).reshape(-1)[:size].reshape(shape).astype(dtype)


def binomial(key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Array:
    """Binomial numbers of 16 fair coins, centred and of variance one: nearly normal, in steps of one half up to ±4.

    Made of integers by counting the bits of half a random word, hence the same on every backend. Kurtosis 2.875.
    """
    size, coins = math.prod(shape), 16
    words = drawn(_words, key, (-(-size // 2),))
    # All lower halves, then all upper ones: taken in turn, XLA did not vectorise them, at a third of the speed.
    halves = jnp.concatenate([words & 0xFFFF, words >> coins])[:size]
    heads = lax.population_count(halves).astype(dtype)
    return ((heads - coins / 2) * (2 / math.sqrt(coins))).reshape(shape)


def sphere(key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Array:
    """Uniform on the sphere of radius √d_leaf, so that E[u uᵀ] = I holds leaf by leaf."""
    normal = _normal(key, shape, dtype)
    return normal * (math.sqrt(normal.size) / jnp.linalg.norm(normal))


SamplerName = Literal["gaussian", "rademacher", "binomial", "sphere"]
SAMPLERS: dict[str, Sampler] = {
    "gaussian": gaussian,
    "rademacher": rademacher,
    "binomial": binomial,
    "sphere": sphere,
}


def as_sampler(sampler: Sampler | str | None) -> Sampler:
    """A family of raw perturbations, given itself or by name; None means gaussian.

    Raises:
      ValueError: an unknown name.
    """
    if sampler is None:
        return gaussian
    if not isinstance(sampler, str):
        return sampler
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, or a function; got {sampler!r}")
    return SAMPLERS[sampler]


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


def draw_leaves(
    key: Key[Array, ""], tree: PyTree[Shaped[Array, "..."]], draw: Callable[[Any, Sequence[int], Array], Array]
) -> list[Array]:
    """One draw for each leaf, in the order of ``jax.tree.leaves(tree)``.

    Leaf i draws from ``fold_in(key, i)``, i counting unstacked leaves: a leaf of a :class:`hiso_jax.stacked.Stacked`
    is drawn layer by layer, by a vmap over its layers' keys.

    Args:
      key: of all leaves.
      tree: only the shapes and dtypes of its leaves are read.
      draw: (leaf key, shape, leaf) → the leaf's draw, of that shape.
    """
    nodes = jax.tree.leaves(tree, is_leaf=is_stacked)
    counts = [len(jax.tree.leaves(node)) * (node.depth if isinstance(node, Stacked) else 1) for node in nodes]
    # One loop of the hash for the keys of all leaves: each fold_in by itself is a loop to compile. The leaves' own are
    # then kept apart by barriers: XLA for GPUs fuses what reads one array, and would hold all leaves' draws at once.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(sum(counts)))
    drawn, first = [], 0
    for node, count in zip(nodes, counts, strict=True):
        if isinstance(node, Stacked):
            leaves = jax.tree.leaves(node)
            for place, leaf in enumerate(leaves):
                own = lax.optimization_barrier(keys[first + place : first + count : len(leaves)])
                drawn.append(jax.vmap(lambda layer_key, leaf=leaf: draw(layer_key, leaf.shape[1:], leaf))(own))
        else:
            drawn.append(draw(lax.optimization_barrier(keys[first]), node.shape, node))
        first += count
    return drawn


def direction(
    key: Key[Array, ""],
    params: PyTree[Shaped[Array, "..."]],
    curvature: PyTree[Shaped[Array, "..."]] | None = None,
    sampler: Sampler | str | None = None,
) -> PyTree[Shaped[Array, "..."]]:
    """One search direction z = H^{-1/2} ⊙ u (HiSo, Algorithm 1), in the structure of ``params``.

    Args:
      key: a perturbation key; leaf i of ``jax.tree.leaves(params)`` draws from ``fold_in(key, i)``, and the layers
        of a :class:`hiso_jax.stacked.Stacked` count as so many leaves.
      params: the trainable parameters; only their shapes and dtypes are read.
      curvature: H in the structure of ``params``, or None for H = 1.
      sampler: the family of raw perturbations; None means :func:`gaussian`.

    Returns:
      z with the shapes of ``params``, in :func:`working_dtype`.
    """
    family = as_sampler(sampler)

    def draw(leaf_key: Any, shape: Sequence[int], leaf: Array) -> Array:
        dtype = working_dtype(leaf)
        # Pinned: XLA would move the constant factors of a draw into the products it later enters, here and not there.
        return pin(family(leaf_key, shape, dtype).astype(dtype))

    if curvature is not None:
        # Tied to the key: in a loop over keys XLA would compute every square root before it and keep them all.
        curvature, key = lax.optimization_barrier((curvature, key))
    z = split_as(jax.tree.leaves(params), draw_leaves(key, params, draw))
    if curvature is not None:
        # A square root and a division, each correctly rounded, so that H = 1 returns u to the last bit and HiSo at
        # decay 1 is DeComFL exactly. Without the inner pin XLA makes of them u · rsqrt(h), which is approximate.
        shape_by = jax.tree.leaves(curvature)
        z = [u / pin(jnp.sqrt(h.astype(u.dtype))) for u, h in zip(z, shape_by, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), z)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Directions:
    """Which direction each (round key, local step, index) names: compared by value, and without arrays.

    It travels inside the optimizer's state, so that who measures and who updates cannot disagree.

    Attributes:
      sampler: the family of raw perturbations.
      key: the key rule, (round key, step k, index p) → the key of a direction.
      groups: G, into which a cohort is dealt: its c-th client is in group c mod G and measures along directions of its
        group (see ``zo/groups.py``). 1 is one set for all; None gives every client its own.
      block: B, coordinates whose signs are flipped together to tell one group's directions from another's; None is
        the largest power of two ≤ min(64, d / (8·G)); 0 draws every group's directions independently, at G times the
        cost.

    Raises:
      ValueError: ``groups`` < 1, or ``block`` negative.
    """

    sampler: Sampler = gaussian
    key: Callable[[Key[Array, ""], ArrayLike, ArrayLike], Key[Array, ""]] = perturbation_key
    groups: int | None = 1
    block: int | None = None

    def __post_init__(self) -> None:
        """Check every range."""
        if self.groups is not None:
            whole("groups", self.groups, 1)
        if self.block is not None:
            whole("block", self.block, 0)

    def groups_of(self, clients: int) -> int:
        """G of a cohort of so many clients.

        Raises:
          ValueError: there are fewer clients than groups.
        """
        if self.groups is not None and self.groups > clients:
            raise ValueError(f"groups must be at most the clients of a round, {clients}, got {self.groups}")
        return clients if self.groups is None else self.groups

    def at(
        self,
        round_key: Key[Array, ""],
        step: ArrayLike,
        index: ArrayLike,
        params: PyTree[Shaped[Array, "..."]],
        curvature: PyTree[Shaped[Array, "..."]] | None = None,
    ) -> PyTree[Shaped[Array, "..."]]:
        """The direction itself, see :func:`direction`."""
        return direction(self.key(round_key, step, index), params, curvature, self.sampler)


def as_directions(sampler: "Directions | Sampler | str | None") -> Directions:
    """Directions fresh in every round of a family, given itself or by name; None means gaussian.

    Raises:
      ValueError: an unknown name.
    """
    return sampler if isinstance(sampler, Directions) else Directions(as_sampler(sampler))


def perturb(params: PyTree[Shaped[Array, "..."]], z: PyTree[Shaped[Array, "..."]], scale: ArrayLike) -> PyTree:
    """``params + scale · z``, added in the wider dtype and then cast to the parameters' own.

    Scanned layers are perturbed one at a time, inside the scan of the model that reads them: in place of a
    :class:`hiso_jax.stacked.Stacked` stands a :class:`hiso_jax.stacked.Layers`, and no perturbed copy of all of them
    exists.
    """

    def moved(x: Array, u: Array) -> Array:
        # Pinned, so that the sum is not contracted in one program and not in another.
        return (x.astype(u.dtype) + pin(jnp.asarray(scale, u.dtype) * u)).astype(x.dtype)

    def node(x: Any, u: Any) -> Any:
        if isinstance(x, Stacked):
            return Layers((x.layers, u.layers), lambda layer: jax.tree.map(moved, *layer))
        return moved(x, u)

    return jax.tree.map(node, params, z, is_leaf=is_stacked)
