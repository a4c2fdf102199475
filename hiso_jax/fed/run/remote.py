"""A run whose clients are elsewhere: the session of every run, with rounds whose messages another program brings."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Int8, PyTree

from hiso_jax.checks import ParameterError, integer
from hiso_jax.fed.algorithm import Algorithm, are_finite
from hiso_jax.fed.devices import Placement, longest_axis, memory_budget
from hiso_jax.fed.keys import channel_key, cohort_key, round_key
from hiso_jax.fed.ledger import Storage
from hiso_jax.fed.measure import Cohort, Estimator, Keys
from hiso_jax.fed.population import ABSENT, LATE, REPORTED, Participation, RemotePopulation, permute
from hiso_jax.fed.round import Arrived, server_settle
from hiso_jax.fed.run import monitor as monitoring
from hiso_jax.fed.run.buffered import late_of
from hiso_jax.fed.run.callbacks import Callbacks, as_callbacks
from hiso_jax.fed.run.config import SimulationConfig
from hiso_jax.fed.run.interrupt import stopped_by_interrupt
from hiso_jax.fed.run.local_rate import with_local_rate
from hiso_jax.fed.run.prepared import RunSpec, estimator_of, prepare, with_defaults
from hiso_jax.fed.run.programs import costs_of
from hiso_jax.fed.run.result import Result
from hiso_jax.fed.run.secret import secret_of
from hiso_jax.fed.run.session import Callback, Session
from hiso_jax.fed.run.state import Inputs, RoundLog, RunState
from hiso_jax.fed.run.traffic import Costs
from hiso_jax.fed.task import Task
from hiso_jax.fed.task_checks import check_given
from hiso_jax.fed.update import ServerState


class Arrivals(NamedTuple):
    """What came of a round.

    Attributes:
      cohort: the ids of the invited clients, [C].
      status: ABSENT, DROPPED, LATE or REPORTED for each, [C].
      messages: their messages as they arrived, [C, ...]; any numbers where none came.
      losses: their losses at the start of the round, [C]; not read in a private run.
      examples: the number of examples that each holds, [C].
      version, place: the round in which each visit began, and its place among those that this round invited, [C]; None
        in a synchronous round.
    """

    cohort: Int[np.ndarray, "C"]
    status: Int8[np.ndarray, "C"]
    messages: PyTree
    losses: Float[np.ndarray, "C"]
    examples: Int[np.ndarray, "C"]
    version: Int[np.ndarray, "C"] | None = None
    place: Int[np.ndarray, "C"] | None = None


Exchange = Callable[[int, Int[np.ndarray, "N"], ServerState], Arrivals]
"""(r, all clients in the order in which the round's seed invites them, the server's state) → what came."""


def completed(task: Task, algorithm: Algorithm, config: SimulationConfig) -> tuple[SimulationConfig, Estimator]:
    """The configuration with the method's defaults, and how clients measure with it."""
    config = with_local_rate(algorithm, with_defaults(algorithm, config), task)
    return config, estimator_of(algorithm, config)


class _Elsewhere:
    """A task whose training examples are elsewhere: one example of zeros has their shapes."""

    def __init__(self, task: Any) -> None:
        self._task = task
        self.train = jax.tree.map(lambda a: np.zeros((1, *a.shape[1:]), a.dtype), task.train)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)


class RemoteRun:
    """A run whose clients are elsewhere. Ledger, evaluations, warnings, snapshots and resuming are those of every run.

    Args:
      task: the model, its loss and its metrics; of its examples only the test split is read.
      algorithm: the method, whose messages are scalars.
      config: the configuration.
      clients: N, the number of clients.
      storage: the directory that keeps the run; None keeps it in memory.
      callbacks: as those of :class:`hiso_jax.fed.Simulation`.

    Attributes:
      algorithm: the method.
      config: the configuration with the method's defaults.
      estimator: how clients measure.
      costs: the costs of a client's visit.

    Raises:
      ParameterError: a setting is out of range, or the method does not suit.
    """

    def __init__(
        self,
        task: Task,
        algorithm: Algorithm,
        config: SimulationConfig,
        *,
        clients: int,
        storage: Storage | Path | str | None = None,
        callbacks: Callbacks = (),
    ) -> None:
        """Check the run; :meth:`run` compiles its programs."""
        check_given(task)
        integer("clients", clients, 1)
        if config.cohort > clients:
            raise ParameterError("cohort", f"must be at most the number of clients, {clients}, got {config.cohort}")
        self._storage = Storage(storage) if isinstance(storage, Path | str) else storage
        self._callbacks, self._stop = as_callbacks(callbacks), False
        config = replace(config, rounds_per_dispatch=1)
        shapes = jax.eval_shape(task.init, jax.random.key(0))
        population = RemotePopulation(np.ones(clients, np.int32))
        given = RunSpec(_Elsewhere(task), shapes, population, Participation())
        secret = secret_of(self._storage, None) if algorithm.needs_secret else None
        budget = config.memory_budget or memory_budget()
        self._prepared = prepare(given, algorithm, config, Placement(None, longest_axis), budget, secret)
        self.algorithm, self.config, self.estimator = algorithm, self._prepared.config, self._prepared.estimator
        state = jax.eval_shape(algorithm.optimizer.init, shapes)
        self.costs: Costs = costs_of(algorithm, self.estimator, ServerState(shapes, state), config)
        self._settle = jax.jit(self._settled)
        self._order = jax.jit(lambda key: permute(key, jnp.arange(clients, dtype=jnp.int32), clients))

    def stop(self) -> None:
        """Ask a running :meth:`run` to end after the round in flight."""
        self._stop = True

    def run(
        self, exchange: Exchange, callbacks: tuple[Callback, ...] = (), evaluate: Callable[..., Any] | None = None
    ) -> Result:
        """Run to the last round, to divergence, or until :meth:`stop`; a storage with ``resume`` continues its run.

        Args:
          exchange: brings the messages of a round.
          callbacks: called before the run's own.
          evaluate: (parameters, test split, frozen parameters) → the metrics as numbers by name, in place of an
            evaluation on the task's test split.

        Raises:
          ValueError: the directory holds another run, an altered run, or a run that is being written.
          OSError: the directory cannot be written.
        """
        opened: list[Callback] = []

        def dispatch(carry: RunState, begin: Any, end: Any, inputs: Inputs) -> tuple[RunState, RoundLog]:
            return self._round(exchange, carry, int(begin), inputs)

        try:
            with stopped_by_interrupt("the run ends after the round in flight", self.stop):
                for callback in (*callbacks, *self._callbacks):
                    callback.open()
                    opened.append(callback)
                own = self._prepared, self._storage, opened, lambda: self._stop
                beginning = Session.begin(*own, dispatch=dispatch, evaluate=evaluate)
                with beginning as session:
                    return session.run()
        finally:
            for callback in opened:
                callback.close()
            self._stop = False

    def _round(self, exchange: Exchange, carry: RunState, number: int, inputs: Inputs) -> tuple[RunState, RoundLog]:
        before = time.monotonic()
        came = exchange(number, np.asarray(self._order(cohort_key(inputs.seed_key, number))), carry.server)
        weights = came.examples if self.config.weighting == "examples" else np.ones(len(came.cohort))
        status, visits = came.status, None
        if came.version is not None and came.place is not None:
            most, visits = self.config.max_staleness, (jnp.asarray(came.version), jnp.asarray(came.place))
            if most is not None:
                late = (status == REPORTED) & (number - came.version > most)
                status = np.where(late, LATE, status).astype(np.int8)
        reported = status == REPORTED
        server, monitor, record = self._settle(
            (carry.server, carry.monitor),
            jnp.int32(number),
            jnp.asarray(came.cohort),
            jnp.asarray(np.where(reported, weights, 0), jnp.float32),
            jnp.asarray(reported),
            jax.tree.map(jnp.asarray, came.messages),
            jnp.asarray(came.losses),
            visits,
            inputs,
        )
        if self.algorithm.needs_secret:
            # Private clients tell no loss, and a zero would look like one.
            record = record._replace(loss=jnp.full_like(record.loss, jnp.nan))
        assert carry.synced_to is not None
        last = carry.synced_to[came.cohort]
        here = status != ABSENT
        there = came.cohort[here]
        known = number if came.version is None else jnp.asarray(came.version[here])
        # The time that the round took is real here.
        seconds = jnp.float32(time.monotonic() - before)
        log = RoundLog(jnp.asarray(came.cohort), jnp.asarray(status), last, seconds, record, *(visits or ()))
        carry = carry._replace(server=server, monitor=monitor, synced_to=carry.synced_to.at[there].set(known))
        return carry, jax.tree.map(lambda a: a[None], log)

    def _settled(
        self,
        run: tuple[ServerState, monitoring.Monitor],
        number: Any,
        clients: Any,
        weights: Any,
        reported: Any,
        messages: PyTree,
        losses: Any,
        visits: tuple[Any, Any] | None,
        inputs: Inputs,
    ) -> tuple[ServerState, monitoring.Monitor, Any]:
        server, monitor = run
        private = self.algorithm.needs_secret
        secret = None if inputs.secret is None else channel_key(inputs.secret, number)
        keys = Keys(round_key(inputs.seed_key, number), channel_key(inputs.seed_key, number), number, secret)
        valid = reported & are_finite(messages)
        # A client whose loss is not finite has no finite scalars, whatever it says.
        valid, losses = (valid, jnp.zeros_like(losses)) if private else (valid & jnp.isfinite(losses), losses)
        settle = server_settle(self.algorithm, self.estimator, self._prepared.settings)
        late = None if visits is None else late_of(self.config, server, inputs.seed_key, number, *visits)
        server, record = settle(server, Cohort(clients, weights, clients), keys, Arrived(messages, valid, losses), late)
        monitor = monitoring.watch(monitor, number, record, reported, server.params, server.state, private)
        return server, monitor, record
