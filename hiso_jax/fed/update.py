"""The server's update: it applies an aggregate to parameters and optimizer state, in a run and in every replay."""

from typing import Any, NamedTuple

import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Key, PyTree

from hiso_jax.fed.codes import received
from hiso_jax.zo import Ascent, Visits, apply_updates, like_before, update_with, zo_states


class ServerState(NamedTuple):
    """The state that the server carries from round to round.

    Attributes:
      params: the parameters.
      state: the optimizer's state.
      memory: the memory of the combiner and the clipping; an empty tree if they have none.
    """

    params: PyTree
    state: optax.OptState
    memory: PyTree = ()


class AtHand(NamedTuple):
    """Values of a round that an update may read beside the aggregate.

    Attributes:
      loss: the cohort's loss at the start of the round, for an optimizer that reads it
        (``optax.contrib.reduce_on_plateau``); None if it is not known.
      ascent: Δ, and the scalars from which it was computed; None if it has to be recomputed.
      visits: the visits of clients that the aggregate comes from, for a buffer of answers from several rounds; None if
        all belong to this round.
    """

    loss: Float[Array, ""] | None = None
    ascent: Ascent | None = None
    visits: Visits | None = None


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

    The run and every replay call this function. The update is a branch of a conditional, so it is compiled apart from
    the surrounding code, and its bits are the same in both.

    Args:
      tx: the optimizer.
      params: the parameters.
      state: the optimizer's state.
      aggregate: the broadcast aggregate, from which ``tx`` receives ĝ [K, G·P]; or a tree like the parameters.
      any_valid: whether the aggregate is applied.
      round_key: the key of the round.
      clients: C, the number of clients that the round invited.
      at_hand: other values of the round.
    """
    heads, visits = zo_states(state), at_hand.visits
    groups = 1 if not heads else heads[0].directions.groups_of(clients) if visits is None else len(visits.groups)
    numbers = received(aggregate, groups)
    extra = {} if visits is None else {"visits": visits}

    def apply(operands: tuple[PyTree, Any]) -> tuple[PyTree, Any]:
        params, state = operands
        updates, after = update_with(
            tx,
            numbers,
            state,
            params,
            value=at_hand.loss,
            key=round_key,
            ascent=at_hand.ascent,
            clients=clients,
            **extra,
        )
        return apply_updates(params, updates, round_key), like_before(after, state)

    return lax.cond(any_valid, apply, lambda operands: operands, (params, state))
