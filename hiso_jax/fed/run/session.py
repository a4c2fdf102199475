"""A run in progress: begun or restored, advanced by dispatches, evaluated, stored, and finished."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from hiso_jax.checks import function as check_function
from hiso_jax.fed.devices import agree, in_all_processes
from hiso_jax.fed.ledger import Evaluation, Records, RunStore, Storage, fingerprint, run_store_of, sample
from hiso_jax.fed.population import check_selected
from hiso_jax.fed.run import monitor as monitoring
from hiso_jax.fed.run.counters import Counters
from hiso_jax.fed.run.evaluation import as_numbers
from hiso_jax.fed.run.health_warnings import HealthWarnings
from hiso_jax.fed.run.prepared import PreparedRun
from hiso_jax.fed.run.privacy_spent import privacy_spent
from hiso_jax.fed.run.programs import costs_of, first_state, header_for, initial_parameters, trace
from hiso_jax.fed.run.progress_estimate import RoundTimes, expected_seconds, next_length
from hiso_jax.fed.run.restore import regular_evaluations, restored
from hiso_jax.fed.run.result import Result
from hiso_jax.fed.run.state import Dispatch, RunState
from hiso_jax.fed.task import metric_of, summarise
from hiso_jax.fed.task_checks import check_initial


class Callback:
    """Hooks that a run calls with its :class:`Session`; a subclass overrides the methods that it needs.

    ``session.params``, ``session.state``, ``session.round``, ``session.history`` and others show the run's progress;
    ``session.stop()`` ends it after the dispatch in flight.

    Args:
      function: ``(session, evaluation) → anything``, called by :meth:`after` unless a subclass overrides it.

    Example:
      >>> from hiso_jax import fed
      >>> patience = fed.Callback(lambda session, evaluation: session.seconds > 60 and session.stop())
    """

    _function: Callable[["Session", Evaluation | None], Any] | None = None

    def __init__(self, function: Callable[["Session", Evaluation | None], Any] | None = None) -> None:
        """See the class."""
        if function is not None:
            check_function("function", function, "session, evaluation")
        self._function = function

    def open(self) -> None:
        """Called once, before the programs of the run are compiled."""

    def close(self) -> None:
        """Called once, when the run is over, also if it failed."""

    def begin(self, session: "Session") -> None:
        """Called once, before the first round; the programs are compiled and a resumed run is restored by then."""

    def after(self, session: "Session", evaluation: Evaluation | None) -> None:
        """Called after every dispatch of rounds and every evaluation; ``evaluation`` is the one just made, or None."""
        if self._function is not None:
            self._function(session, evaluation)

    def end(self, session: "Session", result: Result) -> None:
        """Called once, after the last round of a run that completed, diverged or was stopped."""

    def metrics(self, session: "Session") -> Mapping[str, float]:
        """Metrics by name to add to those of an evaluation; called while it is made."""
        return {}


class Session:
    """A run in progress; callbacks receive it.

    Attributes:
      prepared: the task, the algorithm and the configuration of the run, checked.
      storage: the directory that keeps the run, or None.
      round: how many rounds have been run.
      history: the evaluations so far.
      diverged_at: the round at which it diverged, counted from 0, or None.
      seconds: time spent in rounds, without compilation and evaluation.
      compile_seconds: time spent compiling.
      health_warnings: the warnings about its rounds.
      samples: what the model does on some test examples, from the last evaluation of a task with ``samples``.
    """

    @classmethod
    def begin(
        cls,
        prepared: PreparedRun,
        storage: Storage | None = None,
        callbacks: Sequence[Callback] = (),
        should_stop: Callable[[], bool] = lambda: False,
        dispatch: Dispatch | None = None,
        evaluate: Callable[..., Any] | None = None,
    ) -> "Session":
        """A compiled session, at the beginning of the run or where a resumed run had ended.

        Args:
          prepared: the run.
          storage: the directory to keep the run in, locked until the session is closed.
          callbacks: called when the run begins, after every dispatch, and when it ends.
          should_stop: called before every dispatch; True ends the run.
          dispatch: a function that runs rounds in place of the compiled program, with the same arguments and outputs,
            for a server whose messages come from elsewhere.
          evaluate: a function (parameters, test split, frozen parameters) → the metrics as numbers by name, in place of
            the compiled program and of the task's ``summarise``.

        Raises:
          ValueError: the directory holds another run, a run that cannot be continued with these options, an altered
            run, or a run that another process is writing.
          OSError: the directory cannot be written.
        """
        seed_key, primary = jax.random.key(prepared.config.seed), jax.process_index() == 0
        store = in_all_processes(lambda: run_store_of(storage, seed_key, primary=primary))
        try:
            return cls(prepared, storage, store, callbacks, should_stop, dispatch, evaluate)
        except BaseException:
            store.close()
            raise

    def __init__(
        self,
        prepared: PreparedRun,
        storage: Storage | None,
        store: RunStore,
        callbacks: Sequence[Callback],
        should_stop: Callable[[], bool],
        dispatch: Dispatch | None,
        evaluate: Callable[..., Any] | None,
    ) -> None:
        """See :meth:`begin`."""
        self.prepared, self.storage, self._store, self._callbacks = prepared, storage, store, tuple(callbacks)
        self._should_stop, self._stopping = should_stop, False
        self._show = getattr(prepared.task, "samples", None) if evaluate is None else None
        self._reduce = summarise if evaluate is None else lambda _, metrics: as_numbers(metrics)
        self.seconds, self._evaluation_seconds, self._spent = 0.0, 0.0, {"rounds": 0.0, "evaluations": 0.0}
        self.history: list[Evaluation] = []
        self.samples: list[dict[str, str]] = []
        self.diverged_at: int | None = None
        self._length = prepared.length if prepared.config.rounds_per_dispatch else 1
        self._initial = initial_parameters(prepared)
        in_all_processes(check_initial, self._initial)
        carry, shardings = first_state(prepared, self._initial)
        costs = costs_of(prepared.algorithm, prepared.estimator, carry.server, prepared.config)
        self._counters = Counters(costs, prepared.probing)
        self.health_warnings = HealthWarnings.of(prepared, self._initial)
        before = time.perf_counter()
        programs = trace(prepared, costs, carry, shardings)
        # Before the long compilation, so that a run that cannot be continued is refused at once.
        if storage is not None:
            header = header_for(prepared, programs.log, carry.server, self._initial, storage.about)
            found = agree(prepared.mesh, store.rounds)[0]
            like = carry.kept if prepared.needs_snapshots else None
            in_all_processes(lambda: store.begin(header, found, like=like))
        # A finished run needs neither rounds nor evaluations.
        if store.found is None or store.found.seal is None:
            self._dispatch, self._evaluate = programs.compile(prepared, dispatch, evaluate)
        self.compile_seconds = time.perf_counter() - before
        self._carry = self._take_up(carry)

    def __repr__(self) -> str:
        """How far the run is."""
        return f"Session(round {self.round:,} of {self.rounds:,})"

    def __enter__(self) -> "Session":
        """The session; its files are closed on exit."""
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Close the session's files."""
        self._store.close()

    def run(self) -> Result:
        """Run to the last round, to divergence, or until it is stopped.

        Raises:
          OSError: the rounds cannot be written; the rounds written before are kept.
        """
        self._call(lambda callback: callback.begin(self))
        first = self._evaluate_if_due()
        if first is not None:
            self._call_after(first)
        while self.advance():
            self._call_after(self._evaluate_if_due())
            self._snapshot()
        if not self._is_evaluated:
            self._call_after(self._measure())
            self._snapshot()
        result = self._finish()
        self._call(lambda callback: callback.end(self, result))
        return result

    def _call(self, call: Callable[[Callback], Any]) -> None:
        in_all_processes(lambda: [call(callback) for callback in self._callbacks])

    def _call_after(self, evaluation: Evaluation | None) -> None:
        self._call(lambda callback: callback.after(self, evaluation))

    @property
    def rounds(self) -> int:
        """R, the number of rounds to run."""
        return self.prepared.config.rounds

    @property
    def params(self) -> PyTree:
        """The server's parameters; a callback must copy them to keep them."""
        return self._carry.server.params

    @property
    def state(self) -> optax.OptState:
        """The state of the server's optimizer; a callback must copy it to keep it."""
        return self._carry.server.state

    @property
    def train_loss(self) -> float:
        """The mean loss of the last round's cohort; right after an evaluation, the mean since the previous one."""
        return float([*self._counters.losses[-1:], *(row.train_loss for row in self.history[-1:]), math.nan][0])

    def records_since(self, first: int) -> Records | None:
        """The rounds from ``first`` on, also those of a resumed run; None if there is none."""
        return self._store.ledger.since(first) if self.round > first else None

    @property
    def bytes_total(self) -> int:
        """Bytes sent and received by all clients so far."""
        return self._counters.traffic.bytes_up + self._counters.traffic.bytes_down

    @property
    def expected_seconds(self) -> float | None:
        """An estimate of the seconds that the rest of the run takes; None if no measured time supports one."""
        each = self.seconds / max(1, self.round - self._untimed) or None
        times = RoundTimes(each, self._evaluation_seconds, self._counters.traffic.costs.passes)
        return expected_seconds(self.prepared, times, self.round)

    def stop(self) -> None:
        """End the run after the dispatch in flight; the finished rounds are kept."""
        self._stopping = True

    def _take_up(self, carry: RunState) -> RunState:
        """The state that the stored run had reached; ``carry`` is the state at its beginning."""
        store = self._store
        self.round, self._untimed = store.ledger.rounds, 0
        if store.found is None:
            return carry
        evaluations, self.history = store.found.evaluations, regular_evaluations(self.prepared, store)
        if evaluations:
            self.seconds = evaluations[-1].seconds
        if not self.round:
            return carry
        # A killed run has no times for the rounds after its last evaluation.
        self._untimed = self.round - (evaluations[-1].round if evaluations else 0)
        carry = restored(self.prepared, store, carry)
        last = self.history[-1].round if self.history else 0
        self._counters.restore(store.ledger.records, self.prepared.clients, last)
        self.health_warnings.note(store.ledger.records, silent=True)
        self._note_divergence(carry, silent=True)
        return carry

    def _note_divergence(self, carry: RunState, *, silent: bool = False) -> None:
        flag = int(carry.monitor.diverged_at)
        self.diverged_at = None if flag == monitoring.NEVER else flag
        if self.diverged_at is not None:
            self.health_warnings.diverged(self.diverged_at, silent=silent)

    @property
    def _next_evaluation(self) -> int:
        every = self.prepared.config.eval_every
        return min(self.prepared.config.rounds, (self.round // every + 1) * every)

    def advance(self) -> bool:
        """Run a dispatch of rounds and write them before callbacks see the result; False if the run is over or stopped.

        Raises:
          OSError: the rounds cannot be written; neither the ledger nor its file then holds them.
        """
        prepared, config = self.prepared, self.prepared.config
        if self.round >= config.rounds or self.diverged_at is not None:
            return False
        # Each process has its own clock and signals; those of process 0 decide.
        wanted = min(self.round + self._length, self._next_evaluation)
        end, stopping = agree(prepared.mesh, wanted, self._stopping or self._should_stop())
        if stopping:
            return False
        bounds = prepared.placement.replicate((np.int32(self.round), np.int32(end)))
        before = time.perf_counter()
        self._carry, log = jax.block_until_ready(self._dispatch(self._carry, *bounds, prepared.inputs))
        elapsed = time.perf_counter() - before
        self.seconds += elapsed
        self._spent["rounds"] += elapsed
        self._note_divergence(self._carry)
        end = end if self.diverged_at is None else self.diverged_at + 1
        numbers = np.arange(self.round, end, dtype=np.int32)
        log = jax.tree.map(lambda column: column[: len(numbers)], log.on_host())
        if prepared.inputs.participation.select is not None:
            check_selected(numbers, log.cohort, prepared.clients)
        records = self._counters.add(jax.random.key(prepared.config.seed), numbers, log)
        in_all_processes(lambda: self._store.ledger.append(records))
        self.health_warnings.note(records)
        if config.rounds_per_dispatch is None:
            self._length = next_length(self._length, prepared.length, elapsed / len(numbers))
        self.round = end
        return True

    @property
    def _is_evaluated(self) -> bool:
        return bool(self.history) and self.history[-1].round == self.round

    def _evaluate_if_due(self) -> Evaluation | None:
        """Evaluate if an evaluation is due, or is missing because the run was killed."""
        due = self.round % self.prepared.config.eval_every == 0 or self.round == self.prepared.config.rounds
        return self._measure() if due and not self._is_evaluated else None

    def _measure(self) -> Evaluation:
        prepared, counters = self.prepared, self._counters
        before = time.perf_counter()
        outputs = jax.block_until_ready(self._evaluate(self.params, prepared.test, prepared.inputs.frozen))
        self._evaluation_seconds = time.perf_counter() - before
        self._spent["evaluations"] += self._evaluation_seconds
        outputs = jax.tree.map(np.asarray, outputs)
        metrics = self._reduce(prepared.task, outputs)
        if self._show is not None:
            self.samples = self._show(outputs)
        for callback in self._callbacks:
            metrics |= as_numbers(callback.metrics(self))
        if getattr(prepared.task, "metric", None) is not None:
            # Refuse a missing metric before the first round; a report would refuse it only after the last.
            metric_of(prepared.task, metrics)
        row = Evaluation(
            round=self.round,
            train_loss=float(np.nanmean(counters.losses)) if np.isfinite(counters.losses).any() else math.nan,
            metrics=metrics,
            bytes_up=counters.traffic.bytes_up,
            bytes_down=counters.traffic.bytes_down,
            forward_passes=counters.traffic.forward_passes,
            seconds=self.seconds,
            simulated_seconds=self._simulated_seconds,
        )
        digest = None if self.storage is None else fingerprint(prepared.placement.to_host(self.params))
        in_all_processes(lambda: self._store.ledger.evaluated(row, digest))
        self.history.append(row)
        counters.losses.clear()
        self.health_warnings.evaluated()
        return row

    @property
    def _simulated_seconds(self) -> float | None:
        return None if self.prepared.inputs.participation.fleet is None else self._counters.seconds

    def _snapshot(self) -> None:
        """Take a snapshot if one is due.

        Raises:
          OSError: the snapshot cannot be written.
        """
        store, config = self._store, self.prepared.config
        over = self.round >= config.rounds or self.diverged_at is not None
        due = store.wants_snapshot(self.round, self.seconds, evaluated=self._is_evaluated)
        # A finished run needs no snapshot if its method can be replayed.
        due &= not (over and not self.prepared.needs_snapshots)
        if agree(self.prepared.mesh, due)[0]:
            tree = self.prepared.placement.to_host(self._carry.kept)
            in_all_processes(lambda: store.snapshot(self.round, self.seconds, tree))

    def _finish(self) -> Result:
        """Seal the ledger of a run that reached its end, and return the run's result."""
        config, store, traffic = self.prepared.config, self._store, self._counters.traffic
        params, state = self.prepared.placement.to_host((self.params, self.state))
        interrupted = self.round < config.rounds and self.diverged_at is None
        if not interrupted and not (store.found is not None and store.found.seal is not None):
            digest = None if self.storage is None else fingerprint(params)
            ending: dict[str, Any] = {
                "params_sha256": digest,
                "diverged_at": self.diverged_at,
                "seconds": self.seconds,
            }
            if self.storage is not None:
                ending["sample"] = sample(params)
            in_all_processes(lambda: store.ledger.seal(**ending))
        records = store.ledger.records if self.round else None
        return Result(
            records=records,
            metrics=self.history,
            initial_params=self._initial,
            params=params,
            state=state,
            rounds=self.round,
            timed_rounds=self.round - self._untimed,
            diverged_at=self.diverged_at,
            interrupted=interrupted,
            traffic=traffic.summary(),
            forward_passes=traffic.forward_passes,
            compile_seconds=self.compile_seconds,
            run_seconds=self.seconds,
            spent={"compiling": self.compile_seconds, **self._spent},
            simulated_seconds=self._simulated_seconds,
            invalid=self.health_warnings.invalid,
            health_warnings=self.health_warnings.sentences,
            mesh_shape={} if self.prepared.mesh is None else dict(self.prepared.mesh.shape),
            privacy=privacy_spent(self.prepared, records),
            **self._counters.of_messages,
        )
