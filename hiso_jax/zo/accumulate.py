"""Scalars → ascent direction Δ: the one function behind every update and every replay (HiSo, Algorithm 1)."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.shard_alike import shard_alike
from jaxtyping import Array, Float, Key, PyTree, Shaped

from hiso_jax.zo.directions import Directions, Sampler, as_directions, is_partitioned, working_dtype
from hiso_jax.zo.walls import pin

Carry = TypeVar("Carry")


class Ascent(NamedTuple):
    """A Δ that was made while its directions were at hand, and what it was made of.

    Attributes:
      scalars: the aggregate of the one local step, ĝ [1, P] or a tree of such arrays.
      delta: (1/P) Σ_p ĝ_p z_p by the arithmetic of :func:`accumulate`, in the structure of the parameters.
    """

    scalars: PyTree[Float[Array, "1 P"]]
    delta: PyTree[Shaped[Array, "..."]]


def zero_direction(params: PyTree[Shaped[Array, "..."]]) -> PyTree[Shaped[Array, "..."]]:
    """The Δ of no direction, in promote_types(leaf dtype, float32), split over devices as ``params`` are."""
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, working_dtype(x)), params)
    # Nothing in it depends on the parameters but their shapes: the partitioner has to be told.
    return jax.tree.map(lambda x, z: shard_alike(x, z)[1], params, zero) if is_partitioned() else zero


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


def fold_directions(
    direction_at: Callable[[Array], PyTree],
    scalars: PyTree[Shaped[Array, "P ..."]],
    fold: Callable[[Carry, PyTree, PyTree], Carry],
    init: Carry,
) -> Carry:
    """``fold(carry, z_p, scalars_p)`` over a step's directions, each made again: the loop behind every Δ.

    Args:
      direction_at: index p → z_p.
      scalars: one number, or a tree of them, for each direction, [P].
      fold: its arithmetic must be pinned where a replay has to give the same bits (:func:`hiso_jax.zo.pin`).
      init: the first carry.
    """

    def body(carry: Carry, term: tuple[Array, PyTree]) -> tuple[Carry, None]:
        index, scalar = term
        return fold(carry, direction_at(index), scalar), None

    return lax.scan(body, init, (jnp.arange(len(jax.tree.leaves(scalars)[0])), scalars))[0]


def accumulate(
    round_key: Key[Array, ""],
    scalars: Float[Array, "P"],
    params: PyTree[Shaped[Array, "..."]],
    *,
    step: int | Array = 0,
    curvature: PyTree[Shaped[Array, "..."]] | None = None,
    sampler: Directions | Sampler | str | None = None,
) -> PyTree[Shaped[Array, "..."]]:
    """Δ_k = (1/P) Σ_p ĝ_{k,p} z_{k,p}, rebuilt from the round key, one direction at a time.

    The same arguments give the same bits in whatever program the call stands (on one backend and jaxlib).

    Args:
      round_key: the key of the round.
      scalars: ĝ_k, the aggregated scalars of step k, [P].
      params: the trainable parameters; only their shapes and dtypes are read.
      step: local step k.
      curvature: H_r, in the structure of ``params``; None means H = 1.
      sampler: the family of raw perturbations, itself or by name, or :class:`~hiso_jax.zo.Directions`; None means
        gaussian.

    Returns:
      Δ_k in the structure of ``params``, in promote_types(leaf dtype, float32).
    """
    return _accumulate(round_key, scalars, params, step, curvature, as_directions(sampler))


@partial(jax.jit, static_argnames="directions")
def _accumulate(
    round_key: Key[Array, ""],
    scalars: Float[Array, "P"],
    params: PyTree,
    step: int | Array,
    curvature: PyTree | None,
    directions: Directions,
) -> PyTree:
    num_perturbations = scalars.shape[0]
    return fold_directions(
        lambda index: directions.at(round_key, step, index, params, curvature),
        scalars,
        lambda total, z, scalar: add_direction(total, z, scalar, num_perturbations),
        zero_direction(params),
    )
