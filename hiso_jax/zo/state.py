"""The state of a head: the curvature, and the directions along which its scalars are measured."""

from typing import Any, NamedTuple

import jax
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Key, PyTree, Shaped

from hiso_jax.zo.directions import Directions
from hiso_jax.zo.groups import GroupedDirections
from hiso_jax.zo.hadamard import HadamardDirections, grouped_directions


class ScaleByZoState(NamedTuple):
    """State of :func:`scale_by_zo` and :func:`scale_by_hiso`.

    Attributes:
      rounds: the number of updates made, int32 scalar.
      curvature: H in the structure of the parameters, in promote_types(leaf dtype, float32) unless another dtype
        was chosen; None for H = 1.
      directions: the static description of the directions that the scalars must have been measured along.
    """

    rounds: Int[Array, ""]
    curvature: PyTree[Shaped[Array, "..."]] | None
    directions: Directions

    def grouped_directions(
        self, round_key: Key[Array, ""], step: ArrayLike, params: PyTree, *, groups: int, num_perturbations: int
    ) -> GroupedDirections | HadamardDirections:
        """The directions of local step k = ``step`` for all groups, shaped by the curvature of this state."""
        return grouped_directions(self.directions, round_key, step, params, self.curvature, groups, num_perturbations)


def zo_states(state: optax.OptState) -> list[ScaleByZoState]:
    """Every :class:`ScaleByZoState` inside an optimizer state, through any chain or wrapper."""

    def is_zo(node: Any) -> bool:
        return isinstance(node, ScaleByZoState)

    return [node for node in jax.tree.leaves(state, is_leaf=is_zo) if is_zo(node)]


def zo_state(state: optax.OptState) -> ScaleByZoState:
    """The only :class:`ScaleByZoState` inside an optimizer state.

    Raises:
      ValueError: there is none, or more than one.
    """
    found = zo_states(state)
    if len(found) != 1:
        raise ValueError(
            "the optimizer must have exactly one of scale_by_hiso or scale_by_zo, at the head of its chain; "
            f"found {len(found)}"
        )
    return found[0]
