"""A client's half of a round alone, for a client on a machine of its own."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from hiso_jax.fed.algorithm import Algorithm, Senders, are_finite
from hiso_jax.fed.devices import ExecutionSettings, Part
from hiso_jax.fed.measure import Cohort, Estimator, Keys, RoundContext
from hiso_jax.fed.round.channel import Channel
from hiso_jax.fed.round.round import NOBODY, Loss, check_round, execution_of, loss_of_round
from hiso_jax.fed.round.shapes import groups_of
from hiso_jax.fed.update import ServerState
from hiso_jax.zo import in_float32


class Visit(NamedTuple):
    """A client's visit in a round.

    Attributes:
      client_id: its number in the population.
      place: its place in the cohort, 0 to C − 1.
      batches: its batches, a tree of [K, B, ...] arrays of examples.
    """

    client_id: Int[Array, ""]
    place: Int[Array, ""]
    batches: PyTree


class Message(NamedTuple):
    """A client's message, as it leaves the client.

    Attributes:
      content: scalars [K, P], or :class:`~hiso_jax.fed.codes.Coded`.
      is_valid: whether its numbers are finite.
      loss: the client's loss at the start of the round.
    """

    content: PyTree
    is_valid: Bool[Array, ""]
    loss: Float[Array, ""]


ClientRound = Callable[[ServerState, Keys, Visit, PyTree | None], Message]
"""(server state, keys of the round, visit, frozen parameters) → message."""


def client_round(
    loss: Loss, algorithm: Algorithm, estimator: Estimator, settings: ExecutionSettings, clients: int
) -> ClientRound:
    """The message of one client, as :func:`server_round` would make it; ``server_settle`` is the other half.

    Its bits are those of a simulation that takes its clients one by one (``memory_budget=1``), for messages in codes.

    Args:
      loss: the task's loss, ``(params, batch) → [B]``, with a third argument if there are frozen parameters.
      algorithm: the algorithm, whose messages are scalars.
      estimator: how clients measure.
      settings: how the round is computed; a client has no mesh.
      clients: C, the number of clients that a round invites.

    Raises:
      ValueError: a value is out of range.
    """
    check_round(algorithm, estimator, settings)

    def run(server: ServerState, keys: Keys, visit: Visit, frozen: PyTree | None) -> Message:
        one = jnp.ones(1)
        batches = jax.tree.map(lambda a: a[None], visit.batches)
        cohort = Cohort(visit.client_id[None], one, batches)
        places, groups = visit.place[None], groups_of(algorithm, server.params, clients)
        senders = Senders(cohort.client_ids, places, None, one > 0, groups)
        channel = Channel(algorithm, senders, keys.channel, keys.secret)
        context = RoundContext(
            estimator, settings, NOBODY, server, cohort, keys, groups, in_float32(loss_of_round(loss, frozen, keys))
        )
        context = context._replace(execution=execution_of(context), is_alone=True)
        part = Part(places, lambda outputs: outputs, lambda sums: sums)
        measured = estimator.measure.measure(context, cohort, part)
        sent = channel.send(measured.messages)
        valid = are_finite(measured.messages) & are_finite(sent)
        return jax.tree.map(lambda a: a[0], Message(sent, valid, measured.losses))

    return run
