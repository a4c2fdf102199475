"""One round of federated learning as one pure function: measure → valid → send → valid → combine → update."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from hiso_jax.fed.algorithm import (
    Algorithm,
    Probes,
    Senders,
    are_finite,
    mean,
)
from hiso_jax.fed.devices import (
    MODEL,
    Execution,
    ExecutionSettings,
    Part,
    a_device,
    execution_for,
    keeps_directions,
    on_all_devices,
    over_clients,
)
from hiso_jax.fed.ledger import RoundRecord
from hiso_jax.fed.round.channel import Channel
from hiso_jax.fed.round.inputs import Cohort, Data, Draw, Estimator, Keys, check_round
from hiso_jax.fed.round.local import Trainer, train, train_and_average
from hiso_jax.fed.round.prober import Prober
from hiso_jax.fed.round.probes import Measured, Mode, ascent_of, measure_local_steps, measure_once
from hiso_jax.fed.round.shapes import groups_of
from hiso_jax.fed.task import bind
from hiso_jax.fed.update import AtHand, ServerState, server_update
from hiso_jax.zo import LowRank, check_chain, in_float32, zo_state

Loss = Callable[..., Float[Array, "B"]]


class Given(NamedTuple):
    """Data that a round reads beside its cohort's.

    Attributes:
      examples: the training examples if batches are numbers into them, else None.
      source: what these are drawn from.
      frozen: what the model needs beside its trained parameters, or None.
    """

    examples: PyTree | None = None
    source: PyTree | None = None
    frozen: PyTree | None = None


Round = Callable[[ServerState, Cohort, Keys, Given], tuple[ServerState, RoundRecord]]


def server_round(
    loss: Loss, algorithm: Algorithm, estimator: Estimator, settings: ExecutionSettings, draw: Draw | None = None
) -> Round:
    """A round as a function ``(server, cohort, keys, given) → (server, RoundRecord)``.

    Args:
      loss: the task's, ``(params, batch) → [B]``, with a third argument if there are frozen parameters.
      algorithm: the method.
      estimator: how clients measure; its measure is the algorithm's, or the run's.
      settings: how it is computed.
      draw: ``(source, numbers [C]) → int32 [C, K, B]``: clients draw their own batches, and a cohort's data never
        exists whole.

    Raises:
      ValueError: a number out of range; at the call, a loss that is not per example, a state without a zeroth-order
        head where the algorithm has scalars, or an optimizer whose members before the head need the parameters.
    """
    check_round(algorithm, estimator, settings)
    rest = _measured_round if isinstance(estimator.measure, Probes) else _trained_round

    def run(server: ServerState, cohort: Cohort, keys: Keys, given: Given) -> tuple[ServerState, RoundRecord]:
        data = Data(in_float32(bind(loss, given.frozen)), given.examples, given.source, draw, settings.moved_as)
        execution = _plan(data, server.params, cohort, settings)
        clients = len(cohort.numbers)
        groups, hostile = groups_of(algorithm, server.params, clients), cohort.hostile
        honest = (cohort.weights > 0) if hostile is None else (cohort.weights > 0) & ~hostile
        senders = Senders(cohort.numbers, jnp.arange(clients), hostile, honest, groups)
        channel = Channel(algorithm, senders, keys.channel, keys.secret)
        return rest(channel, estimator, settings, execution, data, server, cohort, keys)

    return on_all_devices(run, settings.mesh)


def _plan(data: Data, params: PyTree, cohort: Cohort, settings: ExecutionSettings) -> Execution:
    def one_batch(data: PyTree, batches: PyTree) -> PyTree:
        return data.fetch(jax.tree.map(lambda a: a[0, 0], data.batches(batches)))

    arrays = data.examples, data.source
    batch = jax.eval_shape(
        lambda arrays, batches: one_batch(data._replace(examples=arrays[0], source=arrays[1]), batches),
        arrays,
        cohort.batches,
    )
    return execution_for(
        data.loss,
        params,
        batch,
        jax.tree.leaves(batch)[0].shape[0],
        platform=a_device(settings.mesh).platform,
        client_chunk=settings.client_chunk,
        budget=settings.memory_budget,
        model_shards=1 if settings.mesh is None else settings.mesh.shape.get(MODEL, 1),
    )


def _mode(algorithm: Algorithm, estimator: Estimator, settings: ExecutionSettings, server: ServerState) -> Mode:
    """What becomes of directions: as asked for; else they stay or enter Δ at once where that pays."""
    streams, params = algorithm.is_separable, server.params
    directions, asked = zo_state(server.state).directions, settings.directions
    if not streams and directions.block == 0:
        # Every group's own draws, G·P of them, are too many to stay.
        return "regenerate"
    copies = 2 if streams else estimator.num_perturbations + 1
    # Factors cost nothing to be made again.
    dear = not isinstance(directions.sampler, LowRank) and estimator.local_steps == 1
    if asked is None and dear and keeps_directions(params, settings.memory_budget, copies):
        asked = "keep"
    return "regenerate" if asked != "keep" else "stream" if streams else "keep"


def _measured_round(
    channel: Channel,
    estimator: Estimator,
    settings: ExecutionSettings,
    execution: Execution,
    data: Data,
    server: ServerState,
    cohort: Cohort,
    keys: Keys,
) -> tuple[ServerState, RoundRecord]:
    algorithm, head, reported = channel.algorithm, zo_state(server.state), cohort.weights > 0
    difference = estimator.measure.difference  # type: ignore[union-attr]
    prober = Prober(estimator, difference, execution, data, server.params, head, keys.round, channel.groups)
    mode = _mode(algorithm, estimator, settings, server)

    def measure(batches: PyTree, part: Part) -> Measured:
        if estimator.local_steps > 1:
            return measure_local_steps(prober, batches, part)
        # As if all were valid: where one turns out not to be, the aggregate is made again.
        return measure_once(prober, batches, part, mode, lambda numbers, p: channel.relay(numbers, cohort.weights, p))

    measured = over_clients(measure, settings.mesh)(cohort.batches)
    valid = reported & are_finite(measured.messages)
    messages = channel.send(measured.messages) if measured.sent is None else measured.sent
    valid &= are_finite(messages)
    combined = channel.combine(messages, jnp.where(valid, cohort.weights, 0), server.memory)
    aggregate = combined.aggregate
    numbers = channel.told(aggregate)
    check_chain(algorithm.optimizer, server.params, numbers)
    if measured.ascent is not None:
        # The same bits, and told to be: two programs may sum in different ways.
        holds = (valid == reported).all() & ~combined.clipped.any()
        aggregate = jax.tree.map(lambda made, again: jnp.where(holds, made, again), measured.ascent.scalars, aggregate)
        numbers = aggregate
    ascent, applies = ascent_of(prober, measured, numbers), _applies(algorithm, valid)
    loss = _mean_loss(measured.losses, valid)
    params, state = server_update(
        algorithm.optimizer,
        server.params,
        server.state,
        aggregate,
        applies,
        keys.round,
        len(cohort.numbers),
        AtHand(loss, ascent),
    )
    record = RoundRecord(messages, valid, aggregate, loss)
    record = _with_counts(record, algorithm, combined.clipped, applies)
    return ServerState(params, state, _if_any(valid, combined.memory, server.memory)), record


def _applies(algorithm: Algorithm, valid: Bool[Array, "C"]) -> Bool[Array, ""]:
    """Whether an aggregate is applied: a private one always, since that nobody counted is nobody's business."""
    return jnp.ones((), bool) if algorithm.is_private else valid.any()


def _with_counts(
    record: RoundRecord, algorithm: Algorithm, clipped: Bool[Array, "C"], applies: Bool[Array, ""]
) -> RoundRecord:
    counted = algorithm.is_private or bool(algorithm.rescale)
    return record._replace(
        clipped=clipped.sum(dtype=jnp.int32) if counted else None, applied=applies if algorithm.is_private else None
    )


def _trained_round(
    channel: Channel,
    estimator: Estimator,
    settings: ExecutionSettings,
    execution: Execution,
    data: Data,
    server: ServerState,
    cohort: Cohort,
    keys: Keys,
) -> tuple[ServerState, RoundRecord]:
    algorithm, memory, clients = channel.algorithm, server.memory, len(cohort.numbers)
    clipped = jnp.zeros(clients, bool)
    trainer = Trainer(estimator.measure, estimator, execution, data, server.params, keys)  # type: ignore[arg-type]
    if algorithm.combine is mean and not (algorithm.send or algorithm.rescale or algorithm.attack):
        averaged = over_clients(lambda own, part: train_and_average(trainer, own, part, clients), settings.mesh)(cohort)
        aggregate, valid, losses = averaged
    else:
        # A median, say, needs all messages at once.
        messages, losses = over_clients(lambda own, part: part.join(train(trainer, own)), settings.mesh)(cohort)
        valid = (cohort.weights > 0) & are_finite(messages)
        messages = channel.send(messages)
        valid &= are_finite(messages)
        combined = channel.combine(messages, jnp.where(valid, cohort.weights, 0), memory)
        aggregate, memory, clipped = combined
    applies, loss = _applies(algorithm, valid), _mean_loss(losses, valid)
    params, state = server_update(
        algorithm.optimizer, server.params, server.state, aggregate, applies, keys.round, at_hand=AtHand(loss)
    )
    record = _with_counts(RoundRecord(None, valid, None, loss), algorithm, clipped, applies)
    return ServerState(params, state, _if_any(valid, memory, server.memory)), record


def _mean_loss(losses: Float[Array, "C"], valid: Bool[Array, "C"]) -> Float[Array, ""]:
    # 0 where no client is valid: NaN would stop a user who looks for the first NaN with jax_debug_nans.
    return jnp.where(valid, losses, 0).sum() / jnp.maximum(valid.sum(), 1).astype(losses.dtype)


def _if_any(valid: Bool[Array, "C"], new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(valid.any(), a, b), new, old)
