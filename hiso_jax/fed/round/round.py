"""One round of federated learning as one pure function: measure → valid → send → valid → combine → update.

It has two halves. :func:`measure` ends when the messages have arrived at the server. :func:`settle` computes the update
from them, whether they come from :func:`measure` or from a network.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.fed.algorithm import Algorithm, Senders, are_finite
from hiso_jax.fed.devices import (
    MODEL,
    Execution,
    ExecutionSettings,
    Part,
    a_device,
    execution_for,
    on_all_devices,
    over_clients,
)
from hiso_jax.fed.keys import sampling_key
from hiso_jax.fed.ledger import RoundRecord
from hiso_jax.fed.measure import Cohort, Draw, Estimator, Keys, Measured, RoundContext
from hiso_jax.fed.round.channel import Channel, Combined
from hiso_jax.fed.round.shapes import groups_of
from hiso_jax.fed.task import bind, takes_key
from hiso_jax.fed.update import AtHand, ServerState, server_update
from hiso_jax.zo import Visits, check_chain, check_directions, check_estimator, in_float32

Loss = Callable[..., Float[Array, "B"]]
# A placeholder until the number of clients in memory at a time is known.
NOBODY = Execution(0, 0, 0, 0)


class RoundInputs(NamedTuple):
    """Data that a round reads in addition to its cohort.

    Attributes:
      examples: the training examples if batches are indices into them, else None.
      source: the argument from which the indices are drawn.
      frozen: the model's parameters that are not trained, or None.
    """

    examples: PyTree | None = None
    source: PyTree | None = None
    frozen: PyTree | None = None


Round = Callable[[ServerState, Cohort, Keys, RoundInputs], tuple[ServerState, RoundRecord]]


def check_round(algorithm: Algorithm, estimator: Estimator, settings: ExecutionSettings) -> None:
    """Refuse settings with which no round is possible.

    Raises:
      ValueError: a value is out of range, K > 1 without a rate for the clients' steps, P is smaller than the method's
        ``fewest_perturbations``, directions are kept for K > 1, or a private round would scale the messages of a mixed
        cohort by their lengths.
    """
    check_estimator(estimator.num_perturbations, estimator.mu)
    if estimator.num_perturbations < algorithm.fewest_perturbations:
        raise ParameterError(
            "perturbations",
            f"must be at least {algorithm.fewest_perturbations} for this method, got {estimator.num_perturbations}",
        )
    if estimator.local_steps < 1:
        raise ParameterError("local_steps", f"must be at least 1, got {estimator.local_steps}")
    if settings.directions is not None:
        check_directions(settings.directions)
    estimator.measure.check(estimator, settings.directions)
    if algorithm.needs_secret and estimator.is_balanced:
        raise ParameterError(
            "probe_scale", "must be given for a mixed cohort in a private run: lengths of messages reveal them"
        )


def server_round(
    loss: Loss, algorithm: Algorithm, estimator: Estimator, settings: ExecutionSettings, draw: Draw | None = None
) -> Round:
    """A round as a function ``(server, cohort, keys, inputs) → (server, RoundRecord)``.

    Args:
      loss: the task's loss, ``(params, batch) → [B]``, with a third argument if there are frozen parameters.
      algorithm: the algorithm.
      estimator: how clients measure; its measure is that of the algorithm, or of the run.
      settings: how the round is computed.
      draw: ``(source, client ids [C]) → int32 [C, K, B]``: clients draw their own batches, so that a cohort's data is
        never in memory at once.

    Raises:
      ValueError: a value is out of range; at the call, the loss is not per example, the state of an algorithm with
        scalars has no zeroth-order head, or a member of the optimizer before the head needs the parameters.
    """
    check_round(algorithm, estimator, settings)

    def run(server: ServerState, cohort: Cohort, keys: Keys, inputs: RoundInputs) -> tuple[ServerState, RoundRecord]:
        groups = groups_of(algorithm, server.params, len(cohort.client_ids))
        channel = _channel(algorithm, estimator, cohort, keys, groups)
        context = RoundContext(
            estimator,
            settings,
            NOBODY,
            server,
            cohort,
            keys,
            groups,
            in_float32(loss_of_round(loss, inputs.frozen, keys)),
            inputs.examples,
            inputs.source,
            draw,
            (lambda numbers, p: channel.relay(numbers, cohort.weights, p)) if algorithm.is_separable else None,
            algorithm.combine.linear and not (algorithm.send or algorithm.rescale or algorithm.attack),
        )
        context = context._replace(execution=execution_of(context))
        return settle(channel, context, measure(channel, context))

    return on_all_devices(run, settings.mesh)


def loss_of_round(loss: Loss, frozen: PyTree | None, keys: Keys) -> Callable[[PyTree, PyTree], Array]:
    """A task's loss as a function of trained parameters and batch; a loss that samples gets the round's key."""
    keyed = partial(loss, key=sampling_key(keys.channel)) if takes_key(loss) else loss
    return bind(keyed, frozen)


Invite = Callable[[ServerState, Cohort, Keys, RoundInputs, Int[Array, ""]], "Arrived"]
"""(server, some clients of a cohort, keys of the round, inputs, the place of the first in the cohort) → messages."""


def client_answers(
    loss: Loss, algorithm: Algorithm, estimator: Estimator, settings: ExecutionSettings, draw: Draw, groups: int
) -> Invite:
    """The clients' half of a round alone, for clients whose answers count in later rounds.

    Args:
      loss: as in :func:`server_round`, like all that is not named here.
      algorithm: the algorithm, whose messages are scalars.
      estimator: how clients measure.
      settings: how the round is computed.
      draw: the function that draws the clients' batches.
      groups: G, the number of groups of directions in a round.

    Raises:
      ValueError: a value is out of range.
    """
    check_round(algorithm, estimator, settings)

    def run(server: ServerState, cohort: Cohort, keys: Keys, inputs: RoundInputs, first: Int[Array, ""]) -> "Arrived":
        channel = _channel(algorithm, estimator, cohort, keys, groups, first)
        whole = in_float32(loss_of_round(loss, inputs.frozen, keys))
        context = RoundContext(
            estimator, settings, NOBODY, server, cohort, keys, groups, whole, inputs.examples, inputs.source, draw
        )
        return measure(channel, context._replace(execution=execution_of(context)), first)

    return on_all_devices(run, settings.mesh)


class Late(NamedTuple):
    """Which visits a buffer's answers come from, and what their lateness costs them.

    Attributes:
      visits: the visits, whose directions belong to the rounds in which they began.
      discounts: the factor on each message, [B].
    """

    visits: Visits
    discounts: Float[Array, "B"]


Settle = Callable[..., tuple[ServerState, RoundRecord]]
"""(server, cohort, keys, arrived, and for a buffer of answers from several rounds late) → (server, RoundRecord)."""


def server_settle(algorithm: Algorithm, estimator: Estimator, settings: ExecutionSettings) -> Settle:
    """The server's half of a round alone, for messages from another source, a network, say.

    With the same messages it computes the same update as :func:`server_round`, to the last bit.

    Args:
      algorithm: the algorithm, whose messages are scalars.
      estimator: how the clients measured.
      settings: how the round is computed.

    Returns:
      ``(server, cohort, keys, arrived, late=None) → (server, RoundRecord)``; with ``late`` the messages are of several
      rounds, see :class:`Late`.

    Raises:
      ValueError: a value is out of range.
    """
    check_round(algorithm, estimator, settings)

    def run(
        server: ServerState, cohort: Cohort, keys: Keys, arrived: Arrived, late: Late | None = None
    ) -> tuple[ServerState, RoundRecord]:
        clients = len(cohort.client_ids)
        # Every late answer has directions of its own: a group of one.
        groups = groups_of(algorithm, server.params, clients) if late is None else clients
        channel = _channel(algorithm, estimator, cohort, keys, groups)
        context = RoundContext(estimator, settings, NOBODY, server, cohort, keys, groups, _no_loss)
        return settle(channel, context, arrived, late)

    return on_all_devices(run, settings.mesh)


def _no_loss(params: PyTree, batch: PyTree) -> Array:
    raise AssertionError("a server evaluates no loss")


def _channel(
    algorithm: Algorithm,
    estimator: Estimator,
    cohort: Cohort,
    keys: Keys,
    groups: int,
    first: Int[Array, ""] | None = None,
) -> Channel:
    """The message path of the round; ``first`` is the place of the first of these clients."""
    places, hostile, honest = jnp.arange(len(cohort.client_ids)), cohort.hostile, cohort.weights > 0
    senders = Senders(
        cohort.client_ids,
        places if first is None else first + places,
        hostile,
        honest if hostile is None else honest & ~hostile,
        groups,
        cohort.probing if estimator.is_balanced else None,
    )
    return Channel(algorithm, senders, keys.channel, keys.secret)


def execution_of(context: RoundContext) -> Execution:
    """The number of clients in memory at a time."""

    def one_batch(context: RoundContext, batches: PyTree) -> PyTree:
        return context.fetch(jax.tree.map(lambda a: a[0, 0], context.batches(batches)))

    arrays, settings = (context.examples, context.source), context.settings
    batch = jax.eval_shape(
        lambda arrays, batches: one_batch(context._replace(examples=arrays[0], source=arrays[1]), batches),
        arrays,
        context.cohort.batches,
    )
    return execution_for(
        context.loss,
        context.params,
        batch,
        jax.tree.leaves(batch)[0].shape[0],
        platform=a_device(settings.mesh).platform,
        client_chunk=settings.client_chunk,
        budget=settings.memory_budget,
        model_shards=1 if settings.mesh is None else settings.mesh.shape.get(MODEL, 1),
        backward=getattr(context.estimator.measure, "backpropagates", False),
    )


class Arrived(NamedTuple):
    """The messages of a round as they arrived at the server.

    Attributes:
      messages: the messages of all clients, [C, ...]; None if only their mean was kept.
      valid: mask of the clients that reported finite values only, [C].
      losses: every client's loss at the start of the round, [C].
      measured: the measurement, if the update may take values from it; None if the server did not see it.
    """

    messages: PyTree | None
    valid: Bool[Array, "C"]
    losses: Float[Array, "C"]
    measured: Measured | None = None


def measure(channel: Channel, context: RoundContext, first: Int[Array, ""] | None = None) -> Arrived:
    """The clients' half of a round: the clients measure and send; ``first`` is the place of the first of them."""

    def own(cohort: Cohort, part: Part) -> Measured:
        placed = part if first is None else part._replace(places=first + part.places)
        return context.estimator.measure.measure(context, cohort, placed)

    measured = over_clients(own, context.settings.mesh)(context.cohort)
    if measured.valid is not None:
        return Arrived(None, measured.valid, measured.losses, measured)
    valid = (context.cohort.weights > 0) & are_finite(measured.messages)
    # Messages sent while they were measured assume that all are valid; if one is not, the aggregate is recomputed.
    messages = channel.send(measured.messages) if measured.sent is None else measured.sent
    return Arrived(messages, valid & are_finite(messages), measured.losses, measured)


def settle(
    channel: Channel, context: RoundContext, arrived: Arrived, late: Late | None = None
) -> tuple[ServerState, RoundRecord]:
    """The server's half of a round: the server combines the messages and updates the model."""
    algorithm, server, cohort = channel.algorithm, context.server, context.cohort
    valid, measured, ascent = arrived.valid, arrived.measured, None
    if measured is not None and measured.mean is not None:
        combined = Combined(measured.mean, server.memory, jnp.zeros(len(valid), bool))
    else:
        discounts = None if late is None else late.discounts
        combined = channel.combine(arrived.messages, jnp.where(valid, cohort.weights, 0), server.memory, discounts)
    aggregate = combined.aggregate
    if algorithm.has_scalars:
        numbers = channel.received(aggregate)
        check_chain(algorithm.optimizer, server.params, numbers)
        if measured is not None and measured.ascent is not None:
            # The two aggregates should have the same bits; selecting one guarantees it where programs sum differently.
            holds = (valid == (cohort.weights > 0)).all() & ~combined.clipped.any()
            aggregate = numbers = jax.tree.map(
                lambda made, again: jnp.where(holds, made, again), measured.ascent.scalars, aggregate
            )
        if measured is not None:
            ascent = context.estimator.measure.ascent(context, measured, numbers)
    # A private aggregate is always applied, because whether any client counted must stay hidden.
    applies = jnp.ones((), bool) if algorithm.is_private else valid.any()
    loss = _mean_loss(arrived.losses, valid)
    params, state = server_update(
        algorithm.optimizer,
        server.params,
        server.state,
        aggregate,
        applies,
        context.keys.round,
        len(cohort.client_ids),
        AtHand(loss, ascent, None if late is None else late.visits),
    )
    memory = jax.tree.map(lambda new, old: jnp.where(valid.any(), new, old), combined.memory, server.memory)
    kept = (arrived.messages, aggregate) if algorithm.has_scalars else (None, None)
    counted = algorithm.is_private or bool(algorithm.rescale)
    record = RoundRecord(
        kept[0],
        valid,
        kept[1],
        loss,
        clipped=combined.clipped.sum(dtype=jnp.int32) if counted else None,
        applied=applies if algorithm.is_private else None,
    )
    return ServerState(params, state, memory), record


def _mean_loss(losses: Float[Array, "C"], valid: Bool[Array, "C"]) -> Float[Array, ""]:
    # 0 if no client is valid: NaN would stop a user who searches for the first NaN with jax_debug_nans.
    return jnp.where(valid, losses, 0).sum() / jnp.maximum(valid.sum(), 1).astype(losses.dtype)
