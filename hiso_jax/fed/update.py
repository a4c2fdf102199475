"""The server's update: an aggregate applied to parameters and optimizer state, in a run and in every replay."""

from typing import Any, NamedTuple

import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Key, PyTree

from hiso_jax.fed.codes import received
from hiso_jax.zo import Ascent, apply_updates, like_before, update_with, zo_states


class ServerState(NamedTuple):
    """What the server carries from round to round.

    Attributes:
      params: the parameters.
      state: its optimizer's state.
      memory: of its combiner and its clipping, an empty tree if they have none.
    """

    params: PyTree
    state: optax.OptState
    memory: PyTree = ()


class AtHand(NamedTuple):
    """Values of a round that an update may read beside the aggregate.

    Attributes:
      loss: of the cohort where the round began, for an optimizer that reads it (``optax.contrib.reduce_on_plateau``);
        None where it is not known.
      ascent: Δ, and the scalars that it was made of; None where it has to be made again.
    """

    loss: Float[Array, ""] | None = None
    ascent: Ascent | None = None


NOTHING = AtHand()


def server_update(
    tx: optax.GradientTransformationExtraArgs,
    params: PyTree,
    state: optax.OptState,
    aggregate: PyTree,
    any_valid: Bool[Array, ""],
    round_key: Key[Array, ""],
    clients: int = 1,
    at_hand: AtHand = NOTHING,
) -> tuple[PyTree, optax.OptState]:
    """Apply an aggregate to parameters and optimizer state, or leave both if no client was valid.

    The run and every replay call this same function. As a branch of a conditional it is also compiled apart from
    what stands around it, which keeps its bits the same in both.

    Args:
      tx: the optimizer.
      params: the parameters.
      state: the optimizer's state.
      aggregate: what everyone was told, of which ``tx`` takes ĝ [K, G·P]; or a tree like the parameters.
      any_valid: whether there is anything to apply.
      round_key: the key of the round.
      clients: how many the round invited, C.
      at_hand: other values of the round.
    """
    heads = zo_states(state)
    numbers = received(aggregate, heads[0].directions.groups_of(clients) if heads else 1)

    def apply(operands: tuple[PyTree, Any]) -> tuple[PyTree, Any]:
        params, state = operands
        updates, after = update_with(
            tx, numbers, state, params, value=at_hand.loss, key=round_key, ascent=at_hand.ascent, clients=clients
        )
        return apply_updates(params, updates, round_key), like_before(after, state)

    return lax.cond(any_valid, apply, lambda operands: operands, (params, state))
