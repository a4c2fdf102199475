"""Many rounds in one program: invite, attend, measure, update and watch, scanned on the device."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Int8, Key, PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.fed.algorithm import Algorithm
from hiso_jax.fed.devices import ExecutionSettings, on_all_devices
from hiso_jax.fed.keys import (
    attackers_key,
    backprop_key,
    channel_key,
    cohort_key,
    data_key,
    presence_key,
    round_key,
    traits_key,
)
from hiso_jax.fed.ledger import Records, RoundRecord
from hiso_jax.fed.measure import Cohort, Estimator, Keys
from hiso_jax.fed.population import (
    ABSENT,
    REPORTED,
    AnyPopulation,
    Attendance,
    Participation,
    SelectionState,
    Work,
    attend,
    no_records,
    permute,
    sample_cohort,
)
from hiso_jax.fed.round import Loss, Round, RoundInputs, client_answers, groups_of, server_round, server_settle
from hiso_jax.fed.run import monitor as monitoring
from hiso_jax.fed.run.buffered import AtWork, Buffer
from hiso_jax.fed.run.config import SimulationConfig
from hiso_jax.fed.run.traffic import NEVER_CAME, Costs, directions_made, download_bytes, upload_bytes
from hiso_jax.fed.update import ServerState
from hiso_jax.zo import fold_in


class Rates(NamedTuple):
    """The learning rates that are numbers: arguments of a program, so that runs at other rates share it.

    Attributes:
      server: the rate of the algorithm; None if the algorithm holds it itself.
      local: the rate of the clients' own steps; None if there is none, or a schedule.
    """

    server: float | None = None
    local: float | None = None


class Inputs(NamedTuple):
    """The inputs that a program reads and does not change.

    Attributes:
      seed_key: the run's seed key.
      train: the training examples.
      population: the clients and the training examples that each holds.
      participation: which invited clients come, and how fast they are.
      frozen: the parameters that the model needs beside its trained ones, or None.
      secret: the server's secret key, for cohorts and noise that only the server may know; None for a run without
        secrets.
      rates: the learning rates that are numbers.
    """

    seed_key: Key[Array, ""]
    train: PyTree
    population: AnyPopulation
    participation: Participation
    frozen: PyTree | None = None
    secret: Key[Array, ""] | None = None
    rates: Rates = Rates()


class RunState(NamedTuple):
    """The state that a run carries from round to round on the device.

    Attributes:
      server: parameters, optimizer state and the server's memory.
      monitor: the divergence check.
      synced_to: the round at which each client was last synced, int32 [N]. A population costs only these four bytes
        per client. None if bytes are not counted; no client then counts as having missed a round.
      selection: what a rule that selects cohorts reads; None for uniform cohorts.
      at_work: the visits that began and did not end, in an asynchronous run; else None.
    """

    server: ServerState
    monitor: monitoring.Monitor
    synced_to: Int[Array, "N"] | None
    selection: SelectionState | None = None
    at_work: AtWork | None = None

    @property
    def kept(self) -> tuple[PyTree, ...]:
        """What a snapshot holds."""
        return tuple(self.server) if self.at_work is None else (*self.server, self.at_work)


class RoundLog(NamedTuple):
    """The log of a round for the host.

    Attributes:
      cohort: the ids of the invited clients, [C].
      attendance: the status of each, [C].
      synced_to: the round at which each was last synced when it was invited, [C].
      seconds: the simulated duration of the round.
      record: the messages and their aggregate.
      version, place: as in :class:`hiso_jax.fed.Records`.
    """

    cohort: Int[Array, "C"]
    attendance: Int8[Array, "C"]
    synced_to: Int[Array, "C"]
    seconds: Float[Array, ""]
    record: RoundRecord
    version: Int[Array, "C"] | None = None
    place: Int[Array, "C"] | None = None

    def on_host(self) -> "RoundLog":
        """The log of some rounds as NumPy arrays. The loss of a round without a valid client is NaN, not 0."""
        log = jax.tree.map(np.asarray, self)
        loss = np.where(log.record.valid.any(-1), log.record.loss, np.nan).astype(log.record.loss.dtype)
        return log._replace(record=log.record._replace(loss=loss))

    def as_records(self, seed_key: Key[Array, ""], rounds: Any, bytes_up: Any, bytes_down: Any) -> Records:
        """The log of some rounds as the ledger holds it; arrays, or their shapes, have a leading axis R."""
        own: dict[str, Any] = {**self._asdict(), **self.record._asdict()}
        del own["record"], own["synced_to"]
        return Records(seed_key=seed_key, round=rounds, bytes_up=bytes_up, bytes_down=bytes_down, **own)


Probing = Callable[[Int[Array, "C"]], Bool[Array, "C"]]
"""Client ids → which of them cannot backpropagate."""

Dispatch = Callable[[RunState, Any, Any, Inputs], tuple[RunState, RoundLog]]


def newcomers(clients: int) -> Int[Array, "N"]:
    """``synced_to`` of a population before its first round."""
    return jnp.full(clients, NEVER_CAME, jnp.int32)


def first_selection(participation: Participation, clients: int, cohort: int) -> SelectionState | None:
    """``selection`` before the first round."""
    return None if participation.select is None else no_records(clients, cohort)


def draw_batches(config: SimulationConfig) -> Callable[[tuple[AnyPopulation, Key[Array, ""]], Int[Array, "C"]], Array]:
    """The function that draws the batches of a round: ``((population, data key), clients) → int32 [C, K, B]``."""
    return lambda source, clients: source[0].sample(source[1], clients, (config.local_steps or 1, config.batch_size))


class Invited(NamedTuple):
    """The cohort of a round before it measures.

    Attributes:
      clients: the client ids, [C].
      status: the status of each, [C].
      last_synced: the round at which each was last synced, [C].
      seconds: the simulated duration of the round.
    """

    clients: Int[Array, "C"]
    status: Int8[Array, "C"]
    last_synced: Int[Array, "C"]
    seconds: Float[Array, ""]


def _invite(
    config: SimulationConfig,
    costs: Costs,
    synced_to: Array | None,
    selection: SelectionState | None,
    number: Array,
    inputs: Inputs,
) -> Invited:
    seed_key = inputs.seed_key
    # Public cohorts follow from the seed, which every client knows.
    drawn_from = seed_key if inputs.secret is None or config.public_cohorts else inputs.secret
    key, rule = cohort_key(drawn_from, number), inputs.participation.select
    if rule is None or selection is None:
        clients = sample_cohort(key, inputs.population.num_clients, config.cohort)
    else:
        clients = rule(key, number, selection).astype(jnp.int32)
    last_synced = jnp.full_like(clients, number) if synced_to is None else synced_to[clients]
    attendance = _attendance(config, costs, clients, last_synced, number, inputs)
    return Invited(clients, attendance.status, last_synced, attendance.seconds)


def _attendance(
    config: SimulationConfig, costs: Costs, clients: Array, last_synced: Array, number: Array, inputs: Inputs
) -> Attendance:
    """Who of some clients comes in round ``number``, and when each has ended; [C] last synced at ``last_synced``."""
    missed = (number - jnp.maximum(last_synced, 0)).astype(jnp.float32)
    # The clock does not store how many clients of each round were valid, so it assumes that all were.
    broadcast = missed * float(costs.broadcast.most)
    probing, passes = _probing(config, inputs), float(costs.passes)
    work = Work(
        download_bytes(broadcast, last_synced == NEVER_CAME, costs, jnp),
        # A float, like the download: the device's integers cannot hold the size of a message of two gigabytes.
        float(upload_bytes(costs)),
        passes if probing is None else jnp.where(probing(clients), float(costs.probe_passes), passes),
        directions_made(broadcast, missed, costs, jnp),
    )
    keys = presence_key(inputs.seed_key, number), traits_key(inputs.seed_key)
    return attend(inputs.participation, *keys, clients, number, work)


def _hostile(config: SimulationConfig, inputs: Inputs, clients: Int[Array, "C"]) -> Bool[Array, "C"]:
    """Which clients of a cohort are hostile: the same clients in every round, or the same places in every cohort."""
    if config.attackers_of == "cohort":
        return jnp.arange(len(clients)) < round(config.attackers * len(clients))
    total = inputs.population.num_clients
    return permute(attackers_key(inputs.seed_key), clients, total) < round(config.attackers * total)


def probing_clients(
    config: SimulationConfig, participation: Participation, seed_key: Key[Array, ""], total: int
) -> Probing | None:
    """Client ids → which of them cannot backpropagate, the same in every round; None if nobody asks.

    Args:
      config: the configuration.
      participation: the participation, whose fleet has the clients' memory.
      seed_key: the run's seed key.
      total: N, the number of clients.

    Raises:
      ParameterError: memory decides, and the fleet has none.
    """
    share, fleet = config.backprop_share, participation.fleet
    if share is None:
        return None
    if share == "memory":
        if fleet is None or fleet.memory is None or fleet.training_bytes is None:
            raise ParameterError("backprop_share", "is memory, which needs a fleet with `memory` and `training_bytes`")
        return lambda clients: ~fleet.can_train(fold_in(traits_key(seed_key), 2), clients)
    able = round(share * total)
    return lambda clients: permute(backprop_key(seed_key), clients, total) >= able


def probing_in(probing: Probing | None, cohorts: Int[Any, "R C"]) -> Bool[np.ndarray, "R C"] | None:
    """Which clients of some cohorts cannot backpropagate, on the host; None if nobody asks."""
    return None if probing is None else np.asarray(probing(jnp.ravel(cohorts))).reshape(cohorts.shape)


def _probing(config: SimulationConfig, inputs: Inputs) -> Probing | None:
    return probing_clients(config, inputs.participation, inputs.seed_key, inputs.population.num_clients)


Live = tuple[ServerState, monitoring.Monitor]


def _live(
    run_round: Round, config: SimulationConfig, run: Live, number: Array, invited: Invited, inputs: Inputs
) -> tuple[Live, RoundRecord]:
    server, monitor = run
    reported = invited.status == REPORTED
    weights = reported.astype(jnp.float32)
    if config.weighting == "examples":
        weights *= inputs.population.sizes_of(invited.clients)
    hostile = _hostile(config, inputs, invited.clients) if config.attackers else None
    probing = _probing(config, inputs)
    limited = None if probing is None else probing(invited.clients)
    cohort = Cohort(invited.clients, weights, invited.clients, hostile, limited)
    secret = None if inputs.secret is None else channel_key(inputs.secret, number)
    keys = Keys(round_key(inputs.seed_key, number), channel_key(inputs.seed_key, number), number, secret)
    given = RoundInputs(inputs.train, (inputs.population, data_key(inputs.seed_key, number)), inputs.frozen)
    server, record = run_round(server, cohort, keys, given)
    monitor = monitoring.watch(monitor, number, record, reported, server.params, server.state, secret is not None)
    return (server, monitor), record


def _buffered(
    buffer: Buffer, config: SimulationConfig, costs: Costs, carry: RunState, number: Array, inputs: Inputs
) -> tuple[RunState, RoundLog]:
    """An asynchronous round: clients are invited, and the server takes the first answers."""
    assert carry.at_work is not None
    server, synced_to = carry.server, carry.synced_to

    def attending(clients: Array, last: Array) -> Attendance:
        return _attendance(config, costs, clients, last, number, inputs)

    hostile = partial(_hostile, config, inputs) if config.attackers else None
    at_work, synced_to = buffer.invite(carry.at_work, server, synced_to, number, inputs, attending, hostile)
    at_work, server, row, record = buffer.take(at_work, server, number, inputs)
    reported = row.attendance == REPORTED
    monitor = monitoring.watch(carry.monitor, number, record, reported, server.params, server.state)
    log = RoundLog(row.cohort, row.attendance, row.synced_to, row.seconds, record, row.version, row.place)
    return RunState(server, monitor, synced_to, None, at_work), log


def make_buffered_dispatch(
    buffer: Buffer, config: SimulationConfig, costs: Costs, length: int, mesh: Mesh | None = None
) -> Dispatch:
    """:func:`make_dispatch` for asynchronous rounds."""

    def dispatch(
        carry: RunState, begin: Int[Array, ""], end: Int[Array, ""], inputs: Inputs
    ) -> tuple[RunState, RoundLog]:
        living = jax.jit(partial(_buffered, buffer, config, costs))

        def step(carry: RunState, number: Array) -> tuple[RunState, RoundLog]:
            def idle(carry: RunState, number: Array, inputs: Inputs) -> tuple[RunState, RoundLog]:
                shapes = jax.eval_shape(living, carry, number, inputs)[1]
                return carry, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

            lives = (number < end) & (carry.monitor.diverged_at == monitoring.NEVER)
            return lax.cond(lives, living, idle, carry, number, inputs)

        return lax.scan(step, carry, begin + jnp.arange(length, dtype=jnp.int32))

    return on_all_devices(dispatch, mesh)


def dispatch_for(
    loss: Loss,
    algorithm: Algorithm,
    estimator: Estimator,
    settings: ExecutionSettings,
    config: SimulationConfig,
    costs: Costs,
    params: PyTree,
    length: int,
) -> Dispatch:
    """The dispatch of a run, synchronous or not; ``params`` are the parameters or their shapes."""
    draw, mesh = draw_batches(config), settings.mesh
    if config.buffer is None:
        return make_dispatch(server_round(loss, algorithm, estimator, settings, draw), config, costs, length, mesh)
    groups = groups_of(algorithm, params, config.answers)
    buffer = Buffer(
        config,
        client_answers(loss, algorithm, estimator, settings, draw, groups),
        server_settle(algorithm, estimator, settings),
    )
    return make_buffered_dispatch(buffer, config, costs, length, mesh)


def make_dispatch(
    run_round: Round, config: SimulationConfig, costs: Costs, length: int, mesh: Mesh | None = None
) -> Dispatch:
    """A program for up to ``length`` rounds: ``(carry, begin, end, inputs) → (carry, RoundLog [length, ...])``.

    It runs the rounds begin ≤ r < end. The length is fixed, and rounds past ``end`` or past divergence do nothing.

    Args:
      run_round: the function that ``server_round`` returns with ``draw=draw_batches(config)``.
      config: the run's configuration.
      costs: the costs of a client's visit.
      length: the most rounds of one call.
      mesh: the mesh of ``run_round``.
    """

    def dispatch(
        carry: RunState, begin: Int[Array, ""], end: Int[Array, ""], inputs: Inputs
    ) -> tuple[RunState, RoundLog]:
        # Jitted, so that each is traced once: for the branch that runs it and for the shapes of the idle branch.
        inviting = jax.jit(lambda *given: _invite(config, costs, *given))
        living = jax.jit(lambda *given: _live(run_round, config, *given))

        def blank(function: Callable, *arguments: Any) -> PyTree:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *arguments))

        def step(carry: RunState, number: Array) -> tuple[RunState, RoundLog]:
            # This conditional is separate from that of the round, and ``end`` is separate from divergence. In a sweep,
            # settings diverge one by one, so a conditional on divergence becomes a selection; the end is the same
            # for all settings.
            asked = carry.synced_to, carry.selection, number, inputs
            invited = lax.cond(number < end, inviting, lambda *a: blank(inviting, *a), *asked)
            came = (number < end) & (invited.status != ABSENT)
            synced_to = carry.synced_to
            if synced_to is not None:
                # Outside any conditional, so that the array [N] is updated in place and never copied.
                places = jnp.where(came, invited.clients, len(synced_to))
                synced_to = synced_to.at[places].set(number, mode="drop")

            def idle(*arguments: Any) -> tuple[Any, RoundRecord]:
                return arguments[0], blank(living, *arguments)[1]

            def unless_diverged(*arguments: Any) -> tuple[Any, RoundRecord]:
                return lax.cond(carry.monitor.diverged_at == monitoring.NEVER, living, idle, *arguments)

            run = (carry.server, carry.monitor), number, invited, inputs
            (server, monitor), record = lax.cond(number < end, unless_diverged, idle, *run)
            selection = carry.selection
            if selection is not None:
                selection = selection.after(number, invited.clients, record.valid, record.loss)
            log = RoundLog(invited.clients, invited.status, invited.last_synced, invited.seconds, record)
            return RunState(server, monitor, synced_to, selection), log

        return lax.scan(step, carry, begin + jnp.arange(length, dtype=jnp.int32))

    return on_all_devices(dispatch, mesh)
