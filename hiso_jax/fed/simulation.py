"""The loop: sample, dispatch, evaluate, record."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from hiso_jax.fed import monitor as monitoring
from hiso_jax.fed.config import SimulationConfig
from hiso_jax.fed.dispatch import (
    Inputs,
    RunState,
    checkpoint_bytes,
    draw_batches,
    forward_passes_per_client,
    make_dispatch,
    newcomers,
)
from hiso_jax.fed.evaluation import make_evaluate
from hiso_jax.fed.execution import memory_budget
from hiso_jax.fed.keys import init_key
from hiso_jax.fed.ledger import Ledger
from hiso_jax.fed.mesh import MODEL, agree, check_mesh, gather, param_shardings, put, replicated, state_shardings
from hiso_jax.fed.participation import REPORTED, STATUS_NAMES, Participation
from hiso_jax.fed.population import Clients
from hiso_jax.fed.result import Evaluation, Progress, Result
from hiso_jax.fed.round import make_round
from hiso_jax.fed.task import Task, frozen_of, summarise
from hiso_jax.fed.traffic import Traffic
from hiso_jax.zo import sphere, zo_state

# A dispatch is made long enough for its overhead not to matter and short enough to stop or report soon.
DISPATCH_SECONDS = 0.5
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
        population: Clients,
        config: SimulationConfig,
        *,
        mesh: Mesh | None = None,
        participation: Participation | None = None,
        callbacks: Sequence[Callable[[Progress], None]] = (),
    ) -> None:
        """Place the data on the devices and build, but not yet compile, the programs of the run."""
        if config.cohort > population.num_clients:
            raise ValueError(
                f"cohort must be at most the number of clients, {population.num_clients}, got {config.cohort}"
            )
        population.check(_examples(task.train))
        self.task, self.config, self.callbacks = task, config, tuple(callbacks)
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
        self._inputs = self._place(Inputs(self._seed_key, task.train, population, participation))
        self._inputs = self._inputs._replace(frozen=self._place_parameters(frozen_of(task)))
        self._test = self._place(task.test)
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
        self._dispatch_length = min(config.rounds_per_dispatch or config.eval_every, config.rounds)
        self._dispatch = make_dispatch(run_round, config, self._dispatch_length, self.mesh)
        self._stop = False

    def stop(self) -> None:
        """Ask a running :meth:`run` to end after the dispatch in flight; what it has done is kept."""
        self._stop = True

    def _place(self, tree: PyTree) -> PyTree:
        """On the device, or repeated on every device of the mesh."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return put(tree, replicated(self.mesh, tree))

    def _place_parameters(self, tree: PyTree) -> PyTree:
        """On the device, or split as parameters are over the mesh."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return put(tree, param_shardings(self.mesh, tree))

    def _start(self, initial: PyTree) -> tuple[RunState, Any]:
        """The state of a run that has not begun, and where it lives."""
        newcomer = newcomers(self._inputs.population.num_clients)
        if self.mesh is None:
            # The carry is donated to each dispatch, so the parameters kept for the result are a copy.
            params = jax.tree.map(lambda x: jnp.array(x, copy=True), initial)
            return RunState(params, self.tx.init(initial), monitoring.start(), newcomer), None
        state = jax.eval_shape(self.tx.init, initial)
        own = param_shardings(self.mesh, initial), state_shardings(self.mesh, initial, state)
        rest = put((monitoring.start(), newcomer), replicated(self.mesh, (monitoring.start(), newcomer)))
        params = put(initial, own[0])
        # Made where it lives: a curvature is as large as the parameters.
        state = jax.jit(self.tx.init, out_shardings=own[1])(params)
        return RunState(params, state, *rest), RunState(*own, *replicated(self.mesh, rest))

    def _initial(self) -> PyTree:
        """The initial parameters, in this process's memory if there is a mesh: a device may not hold them whole."""
        key = init_key(self._seed_key)
        if self.mesh is None:
            return self.task.init(key)
        # What is loaded, not computed, is in host memory already, and must not become constants of a program.
        loaded = not jax.make_jaxpr(self.task.init)(key).jaxpr.eqns
        if loaded or self.mesh.shape.get(MODEL, 1) == 1:
            return jax.tree.map(np.asarray, self.task.init(key))
        shapes = jax.eval_shape(self.task.init, key)
        return gather(jax.jit(self.task.init, out_shardings=param_shardings(self.mesh, shapes))(self._place(key)))

    def _compile(self, carry: RunState, shardings: Any) -> tuple[Callable, Callable]:
        """The program of a dispatch and the program of an evaluation."""
        zero = self._place(jnp.int32(0))
        outputs = None
        if self.mesh is not None:
            logs = jax.eval_shape(self._dispatch, carry, zero, zero, self._inputs)[1]
            outputs = shardings, replicated(self.mesh, logs)
        with jax.set_mesh(self.mesh) if self.mesh is not None else nullcontext():
            dispatch = jax.jit(self._dispatch, donate_argnums=0, out_shardings=outputs)
            evaluate = jax.jit(make_evaluate(self.task.metrics, budget=self._budget, mesh=self.mesh))
            return (
                dispatch.lower(carry, zero, zero, self._inputs).compile(),
                evaluate.lower(carry.params, self._test, self._inputs.frozen).compile(),
            )

    def run(self) -> Result:
        """Run to the last round, to divergence, or until :meth:`stop`."""
        config = self.config
        self._stop = False
        initial = self._initial()
        carry, shardings = self._start(initial)
        scalars = config.local_steps * config.perturbations
        traffic = Traffic(scalars, checkpoint_bytes(carry.params, carry.state))
        ledger = Ledger(self._seed_key)
        each = forward_passes_per_client(config)

        before = time.perf_counter()
        dispatch, evaluate = self._compile(carry, shardings)
        compile_seconds = time.perf_counter() - before

        done, run_seconds, simulated_seconds, diverged_at, invalid = 0, 0.0, 0.0, None, 0
        statuses = np.zeros(REPORTED + 1, np.int64)
        history: list[Evaluation] = []
        losses: list[float] = []

        def clock() -> float | None:
            return simulated_seconds if self._has_clock else None

        def measure() -> dict[str, float]:
            outputs = evaluate(carry.params, self._test, self._inputs.frozen)
            return summarise(self.task, jax.tree.map(np.asarray, outputs))

        def take_evaluation() -> Evaluation:
            row = Evaluation(
                round=done,
                train_loss=float(np.nanmean(losses)) if np.isfinite(losses).any() else math.nan,
                metrics=measure(),
                bytes_up=traffic.bytes_up,
                bytes_down=traffic.bytes_down,
                forward_passes=traffic.visits * each,
                seconds=run_seconds,
                simulated_seconds=clock(),
            )
            history.append(row)
            losses.clear()
            return row

        def tell(evaluation: Evaluation | None) -> None:
            loss = evaluation.train_loss if evaluation else float(np.mean(losses[-1:]))
            total = traffic.bytes_up + traffic.bytes_down
            for callback in self.callbacks:
                callback(Progress(done, config.rounds, loss, run_seconds, total, evaluation))

        tell(take_evaluation())
        length = self._dispatch_length if config.rounds_per_dispatch else 1
        while done < config.rounds and diverged_at is None:
            next_evaluation = min(config.rounds, (done // config.eval_every + 1) * config.eval_every)
            # Each process has its own clock and its own signals: process 0's decide.
            end, stopping = agree(self.mesh, min(done + length, next_evaluation), self._stop)
            if stopping:
                break
            bounds = self._place((np.int32(done), np.int32(end)))
            before = time.perf_counter()
            carry, log = jax.block_until_ready(dispatch(carry, *bounds, self._inputs))
            elapsed = time.perf_counter() - before
            run_seconds += elapsed
            if (flag := int(carry.monitor.diverged_at)) != monitoring.NEVER:
                diverged_at, end = flag, flag + 1
            numbers = np.arange(done, end, dtype=np.int32)
            log = _on_host(log, len(numbers))
            ledger.append(numbers, log.clients, log.attendance, log.record)
            traffic.add(numbers, log.attendance, log.synced_to)
            statuses += np.bincount(log.attendance.reshape(-1), minlength=len(statuses))
            invalid += int(np.count_nonzero((log.attendance == REPORTED) & ~log.record.valid))
            simulated_seconds += float(log.seconds.sum(dtype=np.float64))
            losses += log.record.loss.tolist()
            if config.rounds_per_dispatch is None:
                # At most double: the first dispatches are slow for reasons that pass.
                fitting = int(DISPATCH_SECONDS * len(numbers) / elapsed)
                length = max(1, min(self._dispatch_length, 2 * length, fitting))
            done = end
            tell(take_evaluation() if done == next_evaluation else None)
        if history[-1].round != done:
            tell(take_evaluation())

        params, state = (carry.params, carry.state) if self.mesh is None else gather((carry.params, carry.state))
        return Result(
            records=ledger.records if done else None,
            metrics=history,
            initial_params=initial,
            params=params,
            state=state,
            rounds=done,
            diverged_at=diverged_at,
            interrupted=done < config.rounds and diverged_at is None,
            traffic=traffic.summary(),
            forward_passes=traffic.visits * each,
            compile_seconds=compile_seconds,
            run_seconds=run_seconds,
            simulated_seconds=clock(),
            attendance=dict(zip(STATUS_NAMES, statuses.tolist(), strict=True)),
            invalid=invalid,
            mesh_shape={} if self.mesh is None else dict(self.mesh.shape),
        )
