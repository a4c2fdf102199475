"""A run in progress: begun or restored, advanced by dispatches, evaluated, told of, kept, and finished."""

import math
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from hiso_jax.fed.devices import agree, in_all_processes
from hiso_jax.fed.ledger import Evaluation, Storage, fingerprint, keeper_of, sample
from hiso_jax.fed.run import monitor as monitoring
from hiso_jax.fed.run.concerns import Concerns
from hiso_jax.fed.run.dispatch import RunState
from hiso_jax.fed.run.pace import Pace, expected_seconds, next_length
from hiso_jax.fed.run.programs import costs_of, first_state, header_for, initial_parameters, trace
from hiso_jax.fed.run.restore import restored
from hiso_jax.fed.run.result import Callback, Progress, Result
from hiso_jax.fed.run.setup import Setup
from hiso_jax.fed.run.spent import spent
from hiso_jax.fed.run.tally import Tally
from hiso_jax.fed.sanity import check_initial
from hiso_jax.fed.task import metric_of, summarise


class Session:
    """A run in progress; what its callbacks see.

    Attributes:
      setup: what was asked for.
      done: how many rounds have been run.
      history: the evaluations so far.
      diverged_at: the number of the round at which it diverged, or None.
      run_seconds: time spent in rounds, without compilation and evaluation.
      concerns: what there is to say of its rounds.
      begun_at, is_told: how many rounds had been run when the session began, and whether callbacks were told of that.
    """

    def __init__(
        self,
        setup: Setup,
        storage: Storage | None,
        callbacks: Sequence[Callback],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Take the run's directory, if there is one.

        Raises:
          ValueError: it holds another run, or one that is being written or is altered.
        """
        self.setup, self._storage, self._callbacks = setup, storage, tuple(callbacks)
        self._should_stop, self._stopping = should_stop, False
        self._seed_key, primary = jax.random.key(setup.config.seed), jax.process_index() == 0
        self._keeper = in_all_processes(lambda: keeper_of(storage, self._seed_key, primary=primary))
        self.done, self.run_seconds, self._evaluation_seconds = 0, 0.0, 0.0
        self.begun_at, self.is_told = 0, False
        self.diverged_at: int | None = None
        self.history: list[Evaluation] = []
        self._length = setup.length if setup.config.rounds_per_dispatch else 1
        self._new: Evaluation | None = None

    def __enter__(self) -> "Session":
        """The session; its files are closed at the end."""
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Close its files."""
        self._keeper.close()

    @property
    def params(self) -> PyTree:
        """The server's parameters; a copy must be made of what is to outlive the callback."""
        return self._carry.server.params

    @property
    def state(self) -> optax.OptState:
        """Its optimizer's state; likewise."""
        return self._carry.server.state

    def stop(self) -> None:
        """End the run after the dispatch in flight; what it has done is kept."""
        self._stopping = True

    def begin(self) -> None:
        """Compile, and be at the run's beginning or where a run that goes on was ended.

        Raises:
          ValueError: the directory's run cannot be continued so.
          OSError: the directory cannot be written.
        """
        setup, keeper = self.setup, self._keeper
        self._initial = initial_parameters(setup)
        in_all_processes(check_initial, self._initial)
        carry, shardings = first_state(setup, self._initial)
        costs = costs_of(setup.algorithm, setup.estimator, carry.server, setup.config.cohort)
        self._tally = Tally(costs)
        dimension = sum(leaf.size for leaf in jax.tree.leaves(carry.server.params))
        measured_by = setup.config.mu if setup.algorithm.has_scalars else None
        self.concerns = Concerns(measured_by, dimension, setup.loss_dtype)
        self.concerns.begun(self._initial)
        before = time.perf_counter()
        programs = trace(setup, costs, carry, shardings)
        # Before the long work: a run that cannot be continued so is told at once.
        if self._storage is not None:
            header = header_for(setup, programs.log, carry.server, self._initial, self._storage.about)
            found = agree(setup.mesh, keeper.rounds)[0]
            like = None if setup.algorithm.has_scalars else tuple(carry.server)
            in_all_processes(lambda: keeper.begin(header, found, like=like))
        # What has ended needs neither rounds nor evaluations.
        if keeper.found is None or keeper.found.seal is None:
            self._dispatch, self._evaluate = programs.compile(setup)
        self.compile_seconds = time.perf_counter() - before
        self._carry = self._take_up(carry)
        self.begun_at = self.done

    def _take_up(self, carry: RunState) -> RunState:
        """Where the run that was found had come to; ``carry`` is its beginning."""
        keeper, config = self._keeper, self.setup.config
        self.done, self._untimed = keeper.ledger.rounds, 0
        if keeper.found is None:
            return carry
        evaluations = keeper.found.evaluations
        # A run that was interrupted or ended between evaluations, and went on, has evaluations that one which was left
        # alone has not: only the last round's stands beside the regular ones.
        over = self.done >= config.rounds or keeper.found.seal is not None
        self.history = [
            row for row in evaluations if row.round % config.eval_every == 0 or (over and row.round == self.done)
        ]
        if self.history:
            # Whoever forged the ledger may have made its digests anew.
            name = metric_of(self.setup.task, self.history[0].metrics).name
            for row in self.history:
                if name not in row.metrics:
                    raise ValueError(
                        f"{keeper.found.path} is refused: its evaluation after round {row.round} has no {name}"
                    )
        if evaluations:
            self.run_seconds = evaluations[-1].seconds
        if not self.done:
            return carry
        # Rounds after the last evaluation of a run that was killed were not timed.
        self._untimed = self.done - (evaluations[-1].round if evaluations else 0)
        carry = restored(self.setup, keeper, carry)
        last = self.history[-1].round if self.history else 0
        self._tally.restore(keeper.ledger.records, self.setup.clients, last)
        self.concerns.note(keeper.ledger.records, silent=True)
        self._note_divergence(carry)
        return carry

    def _note_divergence(self, carry: RunState) -> None:
        flag = int(carry.monitor.diverged_at)
        self.diverged_at = None if flag == monitoring.NEVER else flag

    @property
    def _next_evaluation(self) -> int:
        every = self.setup.config.eval_every
        return min(self.setup.config.rounds, (self.done // every + 1) * every)

    def advance(self) -> bool:
        """Run a dispatch of rounds, and keep them before anyone sees what they led to; False if there are no more.

        Raises:
          OSError: they cannot be written; neither ledger nor file has them then.
        """
        setup, config = self.setup, self.setup.config
        if self.done >= config.rounds or self.diverged_at is not None:
            return False
        # Each process has its own clock and its own signals: process 0's decide.
        wanted = min(self.done + self._length, self._next_evaluation)
        end, stopping = agree(setup.mesh, wanted, self._stopping or self._should_stop())
        if stopping:
            return False
        bounds = setup.placement.replicate((np.int32(self.done), np.int32(end)))
        before = time.perf_counter()
        self._carry, log = jax.block_until_ready(self._dispatch(self._carry, *bounds, setup.inputs))
        elapsed = time.perf_counter() - before
        self.run_seconds += elapsed
        self._note_divergence(self._carry)
        if self.diverged_at is not None:
            end = self.diverged_at + 1
        numbers = np.arange(self.done, end, dtype=np.int32)
        log = jax.tree.map(lambda column: column[: len(numbers)], log.on_host())
        records = self._tally.add(self._seed_key, numbers, log)
        in_all_processes(lambda: self._keeper.ledger.append(records))
        self.concerns.note(records)
        if config.rounds_per_dispatch is None:
            self._length = next_length(self._length, setup.length, elapsed / len(numbers))
        self.done = end
        return True

    @property
    def _is_evaluated(self) -> bool:
        return bool(self.history) and self.history[-1].round == self.done

    def evaluate(self) -> None:
        """Evaluate if that is due, or was due and is missing since the run was killed."""
        due = self.done % self.setup.config.eval_every == 0 or self.done == self.setup.config.rounds
        if due and not self._is_evaluated:
            self._new = self._measure()

    def evaluate_last(self) -> None:
        """Evaluate where the run ends, if that was not done, and tell of it."""
        if not self._is_evaluated:
            self._new = self._measure()
            self.tell()
            self.snapshot()

    def _measure(self) -> Evaluation:
        setup, tally = self.setup, self._tally
        before = time.perf_counter()
        outputs = jax.block_until_ready(self._evaluate(self.params, setup.test, setup.inputs.frozen))
        self._evaluation_seconds = time.perf_counter() - before
        metrics = summarise(setup.task, jax.tree.map(np.asarray, outputs))
        for callback in self._callbacks:
            metrics |= callback.metrics(self) if hasattr(callback, "metrics") else {}
        if getattr(setup.task, "metric", None) is not None:
            # Before the first round: a report would refuse it after the last.
            metric_of(setup.task, metrics)
        row = Evaluation(
            round=self.done,
            train_loss=float(np.nanmean(tally.losses)) if np.isfinite(tally.losses).any() else math.nan,
            metrics=metrics,
            bytes_up=tally.traffic.bytes_up,
            bytes_down=tally.traffic.bytes_down,
            forward_passes=tally.traffic.forward_passes,
            seconds=self.run_seconds,
            simulated_seconds=self._simulated_seconds,
        )
        digest = None if self._storage is None else fingerprint(setup.placement.whole(self.params))
        in_all_processes(lambda: self._keeper.ledger.evaluated(row, digest))
        self.history.append(row)
        tally.losses.clear()
        self.concerns.evaluated()
        return row

    @property
    def _pace(self) -> Pace:
        each = self.run_seconds / max(1, self.done - self._untimed) or None
        return Pace(each, self._evaluation_seconds, self._tally.traffic.costs.passes)

    @property
    def _simulated_seconds(self) -> float | None:
        return None if self.setup.inputs.participation.fleet is None else self._tally.seconds

    def tell(self) -> None:
        """Tell the callbacks how far the run is, and of an evaluation if one was just made."""
        evaluation, self._new, tally = self._new, None, self._tally
        losses = [evaluation.train_loss] if evaluation else tally.losses[-1:] or [self.history[-1].train_loss]
        progress = Progress(
            round=self.done,
            rounds=self.setup.config.rounds,
            train_loss=float(losses[0]),
            seconds=self.run_seconds,
            bytes_total=tally.traffic.bytes_up + tally.traffic.bytes_down,
            evaluation=evaluation,
            expected_seconds=expected_seconds(self.setup, self._pace, self.done),
            session=self,
        )
        in_all_processes(lambda: [callback(progress) for callback in self._callbacks])
        self.is_told = True

    def snapshot(self) -> None:
        """Take a snapshot if it is time for one.

        Raises:
          OSError: it cannot be written.
        """
        keeper, config = self._keeper, self.setup.config
        over = self.done >= config.rounds or self.diverged_at is not None
        due = keeper.wants_snapshot(self.done, self.run_seconds, evaluated=self._is_evaluated)
        # What is over can be replayed, if it can be replayed at all.
        due &= not (over and self.setup.algorithm.has_scalars)
        if agree(self.setup.mesh, due)[0]:
            tree = self.setup.placement.whole(tuple(self._carry.server))
            in_all_processes(lambda: keeper.snapshot(self.done, self.run_seconds, tree))

    def finish(self) -> Result:
        """Seal the ledger of a run that came to its end, and return what the run leaves behind."""
        config, keeper, traffic = self.setup.config, self._keeper, self._tally.traffic
        params, state = self.setup.placement.whole((self.params, self.state))
        interrupted = self.done < config.rounds and self.diverged_at is None
        if not interrupted and not (keeper.found is not None and keeper.found.seal is not None):
            digest = None if self._storage is None else fingerprint(params)
            ending: dict[str, Any] = {
                "params_sha256": digest,
                "diverged_at": self.diverged_at,
                "seconds": self.run_seconds,
            }
            if self._storage is not None:
                ending["sample"] = sample(params)
            in_all_processes(lambda: keeper.ledger.seal(**ending))
        records = keeper.ledger.records if self.done else None
        return Result(
            records=records,
            metrics=self.history,
            initial_params=self._initial,
            params=params,
            state=state,
            rounds=self.done,
            timed_rounds=self.done - self._untimed,
            diverged_at=self.diverged_at,
            interrupted=interrupted,
            traffic=traffic.summary(),
            forward_passes=traffic.forward_passes,
            compile_seconds=self.compile_seconds,
            run_seconds=self.run_seconds,
            simulated_seconds=self._simulated_seconds,
            attendance=self._tally.attendance,
            invalid=self.concerns.invalid,
            concerns=self.concerns.sentences,
            offset=self._tally.offset,
            mesh_shape={} if self.setup.mesh is None else dict(self.setup.mesh.shape),
            privacy=spent(self.setup, records),
            clipped=self._tally.clipped,
        )
