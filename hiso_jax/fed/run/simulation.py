"""The loop: sample, dispatch, evaluate, record."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.stages import Traced
from jaxtyping import PyTree

from hiso_jax.fed.devices import (
    MODEL,
    Placement,
    agree,
    check_mesh,
    memory_budget,
    replicated,
    together,
)
from hiso_jax.fed.ledger import Keeper, Storage, base_fingerprints, fingerprint, header_of
from hiso_jax.fed.population import AnyPopulation, Participation
from hiso_jax.fed.round import make_round
from hiso_jax.fed.run import monitor as monitoring
from hiso_jax.fed.run.beginning import begin, initial_parameters
from hiso_jax.fed.run.config import SimulationConfig, config_of
from hiso_jax.fed.run.dispatch import (
    Inputs,
    RunState,
    checkpoint_bytes,
    draw_batches,
    forward_passes_per_client,
    make_dispatch,
)
from hiso_jax.fed.run.evaluation import make_evaluate
from hiso_jax.fed.run.result import Evaluation, Progress, Result
from hiso_jax.fed.run.tally import Tally
from hiso_jax.fed.run.traffic import stood_at
from hiso_jax.fed.task import Task, frozen_of, summarise
from hiso_jax.zo import sphere, zo_state

# A dispatch is made long enough for its overhead not to matter and short enough to stop or report soon.
DISPATCH_SECONDS = 0.5
# A program's length: rounds past a dispatch's end do nothing, but each is a step of the scan and a row of its log.
DISPATCH_ROUNDS = 128
MEBIBYTE = 2**20


def _on_host(log: PyTree, rounds: int) -> PyTree:
    return jax.tree.map(lambda column: np.asarray(column)[:rounds], log)


def _examples(data: PyTree) -> int:
    return jax.tree.leaves(data)[0].shape[0]


class Simulation:
    """A federated run: its data on the device, many rounds a dispatch, evaluations in between.

    Args:
      task: the model, its loss and its data, see :class:`hiso_jax.fed.Task`.
      tx: an optax transformation headed by ``scale_by_hiso`` or ``scale_by_zo``.
      population: who holds which training examples, a ``Population`` or a ``VirtualPopulation``.
      config: the run's numbers.
      mesh: devices to split the cohort over, along the mesh's axis ``clients``, and the parameters, along its axis
        ``model``, see :func:`hiso_jax.fed.make_mesh`; it may span processes. None is one device.
      participation: who shows up, and how fast they are; None means everybody, without a clock.
      storage: the directory in which the run is kept, so that it survives its process; None keeps it in memory.
      callbacks: each is called with a :class:`Progress` after every dispatch.

    Raises:
      ValueError: a cohort larger than the population, an index outside the training data, K > 1 without
        ``local_learning_rate``, rates of other clients than the population's, a mesh without an axis ``clients``,
        or parameters split over ``model`` with the sampler ``sphere``.

    Example:
      >>> import hiso_jax
      >>> from hiso_jax import fed, tasks
      >>> task = tasks.digits()
      >>> population = fed.dirichlet(task.train["label"], 20, alpha=0.5)
      >>> config = fed.SimulationConfig(rounds=10, cohort=4, eval_every=5)
      >>> result = fed.Simulation(task, hiso_jax.hiso(1e-2), population, config).run()
      >>> [row.round for row in result.metrics]
      [0, 5, 10]
    """

    def __init__(
        self,
        task: Task,
        tx: optax.GradientTransformation,
        population: AnyPopulation,
        config: SimulationConfig,
        *,
        mesh: Mesh | None = None,
        participation: Participation | None = None,
        storage: Storage | None = None,
        callbacks: Sequence[Callable[[Progress], None]] = (),
    ) -> None:
        """Place the data on the devices and build, but not yet compile, the programs of the run."""
        if config.cohort > population.num_clients:
            raise ValueError(
                f"cohort must be at most the number of clients, {population.num_clients}, got {config.cohort}"
            )
        population.check(_examples(task.train))
        self.task, self.config, self.callbacks, self.storage = task, config, tuple(callbacks), storage
        self._clients = population.num_clients
        self.tx = optax.with_extra_args_support(tx)
        self.mesh = None if mesh is None else check_mesh(mesh)
        self._seed_key = jax.random.key(config.seed)
        if self.mesh is not None and self.mesh.shape.get(MODEL, 1) > 1:
            state = jax.eval_shape(lambda key: self.tx.init(task.init(key)), self._seed_key)
            if zo_state(state).directions.sampler is sphere:
                raise ValueError(
                    "model_shards must be 1 with the sampler sphere: split norms are sums in another order"
                )
        participation = Participation() if participation is None else participation
        participation.check(population.num_clients)
        self._has_clock = participation.fleet is not None
        self._given = task.train, population, participation
        self._placement = Placement(self.mesh)
        self._inputs = self._placement.repeated(Inputs(self._seed_key, task.train, population, participation))
        self._inputs = self._inputs._replace(frozen=self._placement.parameters(frozen_of(task)))
        self._test = self._placement.repeated(task.test)
        # One budget for all processes, so that their programs are one.
        self._budget = config.memory_budget or agree(self.mesh, memory_budget() // MEBIBYTE)[0] * MEBIBYTE
        run_round = make_round(
            task.loss,
            self.tx,
            local_steps=config.local_steps,
            num_perturbations=config.perturbations,
            mu=config.mu,
            method=config.method,
            local_learning_rate=config.local_learning_rate,
            client_chunk=config.client_chunk,
            memory_budget=self._budget,
            mesh=self.mesh,
            draw=draw_batches(config),
            directions=config.directions,
        )
        longest = config.rounds_per_dispatch or min(DISPATCH_ROUNDS, config.eval_every)
        self._dispatch_length = min(longest, config.rounds)
        self._dispatch = make_dispatch(run_round, config, self._dispatch_length, self.mesh)
        self._stop = False

    def stop(self) -> None:
        """Ask a running :meth:`run` to end after the dispatch in flight; what it has done is kept."""
        self._stop = True

    def _restore(self, keeper: Keeper, carry: RunState) -> RunState:
        """The state of the run that ``keeper`` found; ``carry`` is that of its beginning."""
        if keeper.found is None or not len(keeper.found.rows):
            return carry
        records = keeper.found.records
        params, state = keeper.restore((carry.params, carry.state), self.tx, self._placement)
        rest = (
            monitoring.rebuilt(records, params, state),
            stood_at(records.round, records.cohort, records.attendance, self._clients)[1],
        )
        return RunState(params, state, *self._placement.repeated(rest))

    def _trace(self, carry: RunState, shardings: Any) -> tuple[Traced, Traced]:
        """The programs of a dispatch and of an evaluation, not yet compiled."""
        zero = self._placement.repeated(jnp.int32(0))
        outputs = None
        if self.mesh is not None:
            logs = jax.eval_shape(self._dispatch, carry, zero, zero, self._inputs)[1]
            outputs = shardings, replicated(self.mesh, logs)
        with self._on_mesh():
            dispatch = jax.jit(self._dispatch, donate_argnums=0, out_shardings=outputs)
            evaluate = jax.jit(make_evaluate(self.task.metrics, budget=self._budget, mesh=self.mesh))
            return (
                dispatch.trace(carry, zero, zero, self._inputs),
                evaluate.trace(carry.params, self._test, self._inputs.frozen),
            )

    def _compile(self, traced: tuple[Traced, Traced]) -> tuple[Callable, Callable]:
        with self._on_mesh():
            dispatch, evaluate = (program.lower() for program in traced)
            return dispatch.compile(), evaluate.compile()

    def _on_mesh(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def run(self) -> Result:
        """Run to the last round, to divergence, or until :meth:`stop`; with a storage that says so, from where it was.

        Raises:
          ValueError: the storage's directory holds another run, or one that is being written or is altered.
          OSError: it cannot be written; what was done until then is kept and can be resumed.
        """
        primary = jax.process_index() == 0
        keeper = together(lambda: Keeper(self.storage, self._seed_key, primary=primary))
        try:
            return self._run(keeper)
        finally:
            keeper.close()
            # Not when a run begins: it may be asked to stop before its first round.
            self._stop = False

    def _run(self, keeper: Keeper) -> Result:
        config = self.config
        initial = initial_parameters(self._placement, self.task, self._seed_key)
        carry, shardings = begin(self._placement, initial, self.tx, self._clients)
        scalars = config.local_steps * config.perturbations
        tally = Tally(scalars, checkpoint_bytes(carry.params, carry.state))
        each = forward_passes_per_client(config)

        before = time.perf_counter()
        traced = self._trace(carry, shardings)
        # Before the long work: a run that cannot be continued so is told at once.
        if self.storage is not None:
            header = header_of(
                config_of(config),
                self._seed_key,
                carry.params,
                carry.state,
                base=base_fingerprints(initial, frozen_of(self.task)),
                data=fingerprint(self._given),
                record=traced[0].out_info[1].record,
                about=self.storage.about,
            )
            together(keeper.begin, header, agree(self.mesh, keeper.rounds)[0])
        dispatch, evaluate = self._compile(traced)
        compile_seconds = time.perf_counter() - before
        ledger, found = keeper.ledger, keeper.found
        carry = self._restore(keeper, carry)
        done, run_seconds = ledger.rounds, keeper.seconds
        # Rounds after the last evaluation of a run that was killed were not timed.
        untimed = done - keeper.timed
        history: list[Evaluation] = []
        if found is not None:
            history = [row for row in found.evaluations if row.round % config.eval_every == 0]
        if done:
            tally.restore(ledger.records, self._clients, history[-1].round if history else 0)
        flag = int(carry.monitor.diverged_at)
        diverged_at = None if flag == monitoring.NEVER else flag

        def clock() -> float | None:
            return tally.seconds if self._has_clock else None

        def measure() -> dict[str, float]:
            outputs = evaluate(carry.params, self._test, self._inputs.frozen)
            return summarise(self.task, jax.tree.map(np.asarray, outputs))

        def take_evaluation() -> Evaluation:
            row = Evaluation(
                round=done,
                train_loss=float(np.nanmean(tally.losses)) if np.isfinite(tally.losses).any() else math.nan,
                metrics=measure(),
                bytes_up=tally.traffic.bytes_up,
                bytes_down=tally.traffic.bytes_down,
                forward_passes=tally.traffic.visits * each,
                seconds=run_seconds,
                simulated_seconds=clock(),
            )
            digest = fingerprint(self._placement.whole(carry.params)) if self.storage is not None else None
            together(ledger.evaluated, row, digest)
            history.append(row)
            tally.losses.clear()
            return row

        def tell(evaluation: Evaluation | None) -> None:
            losses = [evaluation.train_loss] if evaluation else tally.losses[-1:] or [history[-1].train_loss]
            total = tally.traffic.bytes_up + tally.traffic.bytes_down
            progress = Progress(done, config.rounds, float(losses[0]), run_seconds, total, evaluation)
            together(lambda: [callback(progress) for callback in self.callbacks])

        def is_missing() -> bool:
            """Whether the evaluation due after the rounds done was not made, or was lost."""
            return done % config.eval_every == 0 and not (history and history[-1].round == done)

        tell(take_evaluation() if is_missing() else None)
        length = self._dispatch_length if config.rounds_per_dispatch else 1
        while done < config.rounds and diverged_at is None:
            next_evaluation = min(config.rounds, (done // config.eval_every + 1) * config.eval_every)
            # Each process has its own clock and its own signals: process 0's decide.
            end, stopping = agree(self.mesh, min(done + length, next_evaluation), self._stop)
            if stopping:
                break
            bounds = self._placement.repeated((np.int32(done), np.int32(end)))
            before = time.perf_counter()
            carry, log = jax.block_until_ready(dispatch(carry, *bounds, self._inputs))
            elapsed = time.perf_counter() - before
            run_seconds += elapsed
            if (flag := int(carry.monitor.diverged_at)) != monitoring.NEVER:
                diverged_at, end = flag, flag + 1
            numbers = np.arange(done, end, dtype=np.int32)
            log = _on_host(log, len(numbers))
            rows = tally.add(numbers, log)
            # On disk before anyone sees what the rounds led to.
            together(ledger.append, rows)
            if config.rounds_per_dispatch is None:
                # At most double: the first dispatches are slow for reasons that pass.
                fitting = int(DISPATCH_SECONDS * len(numbers) / elapsed)
                length = max(1, min(self._dispatch_length, 2 * length, fitting))
            done = end
            tell(take_evaluation() if done == next_evaluation else None)
            due = done < config.rounds and diverged_at is None and keeper.wants_snapshot(done, run_seconds)
            if agree(self.mesh, due)[0]:
                together(keeper.snapshot, done, run_seconds, self._placement.whole((carry.params, carry.state)))
        if not history or history[-1].round != done:
            tell(take_evaluation())

        params, state = self._placement.whole((carry.params, carry.state))
        interrupted = done < config.rounds and diverged_at is None
        if not interrupted and not (found is not None and found.seal is not None):
            digest = fingerprint(params) if self.storage is not None else None
            together(lambda: ledger.seal(params_sha256=digest, diverged_at=diverged_at, seconds=run_seconds))
        return Result(
            records=ledger.records if done else None,
            metrics=history,
            initial_params=initial,
            params=params,
            state=state,
            rounds=done,
            timed_rounds=done - untimed,
            diverged_at=diverged_at,
            interrupted=interrupted,
            traffic=tally.traffic.summary(),
            forward_passes=tally.traffic.visits * each,
            compile_seconds=compile_seconds,
            run_seconds=run_seconds,
            simulated_seconds=clock(),
            attendance=tally.attendance,
            invalid=tally.invalid,
            mesh_shape={} if self.mesh is None else dict(self.mesh.shape),
        )
