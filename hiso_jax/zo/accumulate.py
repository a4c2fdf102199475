"""Scalars → ascent direction Δ: the one function behind every update and every replay (HiSo, Algorithm 1)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key, PyTree, Shaped

from hiso_jax.zo.directions import Sampler, direction, perturbation_key, working_dtype
from hiso_jax.zo.walls import pin


class Ascent(NamedTuple):
    """A Δ that was made while its directions were at hand, and what it was made of.

    Attributes:
      scalars: ĝ of the one local step, [1, P].
      delta: (1/P) Σ_p ĝ_p z_p by the arithmetic of :func:`accumulate`, in the structure of the parameters.
    """

    scalars: Float[Array, "1 P"]
    delta: PyTree[Shaped[Array, "..."]]


def zero_direction(params: PyTree[Shaped[Array, "..."]]) -> PyTree[Shaped[Array, "..."]]:
    """The Δ of no direction, in promote_types(leaf dtype, float32)."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, working_dtype(x)), params)


def add_direction(
    total: PyTree[Shaped[Array, "..."]],
    z: PyTree[Shaped[Array, "..."]],
    scalar: Float[Array, ""],
    num_perturbations: int,
) -> PyTree[Shaped[Array, "..."]]:
    """``total + scalar / P · z``: the step of which every Δ is made, whether z is at hand or made again."""
    # XLA turns a division by a constant into this product; written so, every backend has the same bits.
    weight = pin(scalar * jnp.asarray(1 / num_perturbations, scalar.dtype))
    return jax.tree.map(lambda a, u: pin(a + pin(weight.astype(u.dtype) * u)), total, z)


@partial(jax.jit, static_argnames="sampler")
def accumulate(
    round_key: Key[Array, ""],
    scalars: Float[Array, "P"],
    params: PyTree[Shaped[Array, "..."]],
    *,
    step: int | Array = 0,
    curvature: PyTree[Shaped[Array, "..."]] | None = None,
    sampler: Sampler | None = None,
) -> PyTree[Shaped[Array, "..."]]:
    """Δ_k = (1/P) Σ_p ĝ_{k,p} z_{k,p}, rebuilt from the round key, one direction at a time.

    The same arguments give the same bits in whatever program the call stands (on one backend and jaxlib).

    Args:
      round_key: the key of the round.
      scalars: ĝ_k, the aggregated scalars of step k, [P].
      params: the trainable parameters; only their shapes and dtypes are read.
      step: local step k.
      curvature: H_r, in the structure of ``params``; None means H = 1.
      sampler: the family of raw perturbations; None means gaussian.

    Returns:
      Δ_k in the structure of ``params``, in promote_types(leaf dtype, float32).
    """
    num_perturbations = scalars.shape[0]

    def body(total: PyTree, term: tuple[Array, Array]) -> tuple[PyTree, None]:
        index, scalar = term
        z = direction(perturbation_key(round_key, step, index), params, curvature, sampler)
        return add_direction(total, z, scalar, num_perturbations), None

    return lax.scan(body, zero_direction(params), (jnp.arange(num_perturbations), scalars))[0]
