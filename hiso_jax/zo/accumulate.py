"""The ascent direction Δ of a step's scalars: one function for every update and replay (HiSo, Algorithm 1)."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from hiso_jax.checks import ParameterError
from hiso_jax.exact import pin
from hiso_jax.zo.delta_sum import Total
from hiso_jax.zo.directions import Directions, as_directions, working_dtype
from hiso_jax.zo.groups import Direction, GroupedDirections
from hiso_jax.zo.hadamard import HadamardDirections, grouped_directions
from hiso_jax.zo.samplers import Hadamard, Sampler


class Ascent(NamedTuple):
    """A Δ computed while its directions were in memory, with the scalars that it was computed from.

    Attributes:
      scalars: the aggregate of the single local step, ĝ [1, G·P], or a tree of such arrays.
      delta: (1/(G·P)) Σ ĝ_{g,p} z_{g,p} with the arithmetic of :func:`accumulate`, in the structure of the parameters.
    """

    scalars: PyTree[Float[Array, "1 GP"]]
    delta: PyTree[Shaped[Array, "..."]]


class Visits(NamedTuple):
    """The visits that an update's scalars come from, if they do not all belong to the round of the update.

    The aggregate of B visits has B·P columns, P for each visit, in order. Each visit measured along the directions of
    its own round, which its key makes again.

    Attributes:
      keys: the key of the round in which each visit began, [B].
      groups: the group of directions of each visit in that round, [B].
    """

    keys: Key[Array, "B"]
    groups: Int[Array, "B"]


def by_direction(scalars: Float[Array, "GP"], groups: int) -> Float[Array, "P G"]:
    """A step's scalars, stored at index g·P + p, with one row for each direction p."""
    return scalars.reshape(groups, -1).T


def fold_directions(
    directions: GroupedDirections,
    scalars: Float[Array, "P G"],
    direction_at: Callable[[Array], Direction] | None = None,
) -> PyTree[Shaped[Array, "..."]]:
    """Compute Σ_p Σ_g ĝ_{g,p} / (G·P) · z_{g,p}; every Δ comes from this loop, but that of ``zo/hadamard.py``.

    Args:
      directions: the directions of the step.
      scalars: ĝ of every direction and group.
      direction_at: index p → the direction, if it is already in memory; None regenerates each direction.
    """
    direction_at = direction_at or directions.at

    def body(total: Total, term: tuple[Array, Array]) -> tuple[Total, list]:
        index, numbers = term
        return direction_at(index).add_to(total, numbers, len(scalars))

    return directions.finish(*lax.scan(body, directions.begin(), (jnp.arange(len(scalars)), scalars)))


def accumulate(
    round_key: Key[Array, ""],
    scalars: Float[Array, "GP"],
    params: PyTree[Shaped[Array, "..."]],
    *,
    step: int | Array = 0,
    curvature: PyTree[Shaped[Array, "..."]] | None = None,
    sampler: Directions | Sampler | str | None = None,
    groups: int | None = None,
    visits: Visits | None = None,
) -> PyTree[Shaped[Array, "..."]]:
    """Δ_k = (1/P) Σ_p ĝ_{k,p} z_{k,p}, rebuilt from the round key, one direction at a time.

    With G groups of directions: Δ_k = (1/(G·P)) Σ_g Σ_p ĝ_{k,gP+p} z_{k,g,p}. The same arguments give the same bits in
    every program that contains the call (on one backend and jaxlib).

    Args:
      round_key: the key of the round.
      scalars: ĝ_k, the aggregated scalars of step k, [P]; with groups [G·P], indexed by g·P + p.
      params: the trainable parameters; only their shapes and dtypes are read.
      step: local step k.
      curvature: H_r, in the structure of ``params``; None means H = 1.
      sampler: the family of raw perturbations, as a function or by name, or :class:`~hiso_jax.zo.Directions`; None
        means gaussian.
      groups: G; None takes it from ``sampler``.
      visits: the visits that the scalars come from, [B·P]; ``groups`` is then G of the rounds in which they began, and
        Δ_k = (1/(B·P)) Σ_b Σ_p ĝ_{k,bP+p} z_{k,b,p}. None means that all belong to the round of ``round_key``.

    Returns:
      Δ_k in the structure of ``params``, in promote_types(leaf dtype, float32).

    Raises:
      ValueError: each client has its own directions and ``groups`` is None, or G does not divide the number of scalars.
    """
    directions = as_directions(sampler)
    groups = groups_in(directions, scalars, groups, None if visits is None else len(visits.groups))
    return _accumulate(round_key, scalars, params, step, curvature, directions, groups, visits)


def groups_in(
    directions: Directions, scalars: Shaped[Array, "... GP"], groups: int | None, visits: int | None = None
) -> int:
    """The number of groups G in a step's scalars; with ``visits``, the scalars are of B visits, whatever G is.

    Raises:
      ValueError: G is unknown, or does not divide the number of scalars.
    """
    groups = directions.groups if groups is None else groups
    if groups is None:
        raise ParameterError("directions", "that differ for each client need clients=, the number of invited clients")
    parts, name = (groups, "groups") if visits is None else (visits, "visits")
    if scalars.shape[-1] % parts:
        raise ParameterError("scalars", f"of a step must be a multiple of the {parts} {name}, got {scalars.shape[-1]}")
    return groups


@partial(jax.jit, static_argnames=("directions", "groups"))
def _accumulate(
    round_key: Key[Array, ""],
    scalars: Float[Array, "GP"],
    params: PyTree,
    step: int | Array,
    curvature: PyTree | None,
    directions: Directions,
    groups: int,
    visits: Visits | None = None,
) -> PyTree:
    if visits is not None:
        return _of_visits(visits, scalars, params, step, directions, groups)
    rows = by_direction(scalars, groups)
    grouped = grouped_directions(directions, round_key, step, params, curvature, groups, len(rows))
    return grouped.delta(rows) if isinstance(grouped, HadamardDirections) else fold_directions(grouped, rows)


def _of_visits(
    visits: Visits, scalars: Float[Array, "BP"], params: PyTree, step: int | Array, directions: Directions, groups: int
) -> PyTree:
    """(1/(B·P)) Σ_b Σ_p ĝ_{b,p} z_{b,p}: the Δ of each visit alone, summed in order."""
    rows = scalars.reshape(len(visits.groups), -1)
    # A product, as in ``Direction.add_to``.
    shares = pin(rows * jnp.asarray(1 / len(rows), rows.dtype))[:, :, None]
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, working_dtype(x)), params)

    def body(total: PyTree, term: tuple[Array, Array, Array]) -> tuple[PyTree, None]:
        key, group, own = term
        if isinstance(directions.sampler, Hadamard):
            delta = HadamardDirections(directions, key, step, params, None, 1, len(own), group).delta(own)
        else:
            cohort = GroupedDirections(directions, key, step, params, None, groups, len(own))
            delta = fold_directions(cohort._replace(groups=1), own, lambda index: Direction(cohort.at(index).of(group)))
        return jax.tree.map(lambda a, b: pin(a + b), total, delta), None

    return lax.scan(body, zero, (visits.keys, visits.groups, shares))[0]
