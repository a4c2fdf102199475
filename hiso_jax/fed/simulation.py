"""The loop: sample, dispatch, evaluate, record."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Int, Key, PyTree

from hiso_jax.fed import monitor as monitoring
from hiso_jax.fed.config import SimulationConfig
from hiso_jax.fed.evaluation import make_evaluate
from hiso_jax.fed.keys import cohort_key, data_key, init_key, round_key
from hiso_jax.fed.ledger import Ledger, Records
from hiso_jax.fed.population import Population, place
from hiso_jax.fed.round import RoundRecord, make_round
from hiso_jax.fed.task import Task
from hiso_jax.fed.traffic import Traffic

# A dispatch is made long enough for its overhead not to matter and short enough to stop or report soon.
DISPATCH_SECONDS = 0.5


class RunState(NamedTuple):
    """All that a run carries from round to round on the device."""

    params: PyTree
    state: optax.OptState
    monitor: monitoring.Monitor


@dataclass(frozen=True)
class Evaluation:
    """One row of a run's history, taken after ``round`` rounds.

    Attributes:
      round: how many rounds have been run.
      train_loss: the mean cohort loss of the rounds since the row before; NaN at the start.
      metrics: the task's metrics, means over its test split.
      bytes_up, bytes_down: totals over all clients so far.
      forward_passes: client-loss evaluations so far.
      seconds: time spent in rounds so far, without compilation and evaluation.
    """

    round: int
    train_loss: float
    metrics: dict[str, float]
    bytes_up: int
    bytes_down: int
    forward_passes: int
    seconds: float


@dataclass(frozen=True)
class Progress:
    """What callbacks are told after every dispatch; ``evaluation`` is set if one was just made."""

    round: int
    rounds: int
    train_loss: float
    seconds: float
    bytes_total: int
    evaluation: Evaluation | None


@dataclass(frozen=True)
class Result:
    """What a run leaves behind.

    Attributes:
      records: the scalar log of its rounds; None if it ran no round.
      metrics: the evaluations, in order.
      initial_params: the parameters it began with.
      params: the final parameters.
      state: the final optimizer state.
      rounds: how many rounds were run.
      diverged_at: the number of the round at which it diverged, counted from 0, or None.
      interrupted: whether it was stopped before its last round.
      traffic: totals and means of the bytes sent, see :meth:`Traffic.summary`.
      forward_passes: client-loss evaluations.
      compile_seconds: time spent compiling.
      run_seconds: time spent in rounds, without compilation and evaluation.
    """

    records: Records | None
    metrics: list[Evaluation]
    initial_params: PyTree
    params: PyTree
    state: optax.OptState
    rounds: int
    diverged_at: int | None
    interrupted: bool
    traffic: dict[str, float]
    forward_passes: int
    compile_seconds: float
    run_seconds: float


def _examples(data: PyTree) -> int:
    return jax.tree.leaves(data)[0].shape[0]


class Simulation:
    """A federated run: its data on the device, many rounds a dispatch, evaluations in between.

    Args:
      task: the model, its loss and its data, see :class:`hiso_jax.fed.Task`.
      tx: an optax transformation headed by ``scale_by_hiso`` or ``scale_by_zo``.
      population: who holds which training examples.
      config: the run's numbers.
      callbacks: each is called with a :class:`Progress` after every dispatch.

    Raises:
      ValueError: a cohort larger than the population, an index outside the training data, or K > 1 without
        ``local_learning_rate``.

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
        population: Population,
        config: SimulationConfig,
        *,
        callbacks: Sequence[Callable[[Progress], None]] = (),
    ) -> None:
        """Place the data on the device and build, but not yet compile, the programs of the run."""
        if config.cohort > population.num_clients:
            raise ValueError(
                f"cohort must be at most the number of clients, {population.num_clients}, got {config.cohort}"
            )
        held, examples = np.asarray(population.indices), _examples(task.train)
        if held.size and (held.min() < 0 or held.max() >= examples):
            raise ValueError(
                f"population names example {max(held.max(), held.min(), key=abs)}; "
                f"the task has {examples} training examples"
            )
        self.task, self.config, self.callbacks = task, config, tuple(callbacks)
        self.tx = optax.with_extra_args_support(tx)
        self._population = place(population)
        self._train = jax.tree.map(jnp.asarray, task.train)
        self._test = jax.tree.map(jnp.asarray, task.test)
        self._seed_key = jax.random.key(config.seed)
        self._round = make_round(
            task.loss,
            self.tx,
            local_steps=config.local_steps,
            num_perturbations=config.perturbations,
            mu=config.mu,
            method=config.method,
            local_learning_rate=config.local_learning_rate,
            client_chunk=config.client_chunk,
        )
        self._stop = False

    def stop(self) -> None:
        """Ask a running :meth:`run` to end after the dispatch in flight; what it has done is kept."""
        self._stop = True

    def _dispatch(
        self,
        carry: RunState,
        begin: Int[Array, ""],
        end: Int[Array, ""],
        seed_key: Key[Array, ""],
        train: PyTree,
        population: Population,
    ) -> tuple[RunState, tuple[Int[Array, "R C"], RoundRecord]]:
        """Rounds begin ≤ r < end in one program; its length is fixed, and rounds past ``end`` do nothing."""
        config = self.config
        mask = jnp.ones(config.cohort, bool)

        def live(carry: RunState, number: Array) -> tuple[RunState, tuple[Array, RoundRecord]]:
            clients = population.cohort(cohort_key(seed_key, number), config.cohort)
            shape = (config.local_steps, config.batch_size)
            examples = population.sample(data_key(seed_key, number), clients, shape)
            batches = jax.tree.map(lambda a: a[examples], train)
            params, state, record = self._round(carry.params, carry.state, batches, mask, round_key(seed_key, number))
            monitor = monitoring.watch(carry.monitor, number, record, mask, params, state)
            return RunState(params, state, monitor), (clients, record)

        outputs = jax.eval_shape(live, carry, begin)[1]

        def idle(carry: RunState, number: Array) -> tuple[RunState, tuple[Array, RoundRecord]]:
            return carry, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)

        def step(carry: RunState, number: Array) -> tuple[RunState, tuple[Array, RoundRecord]]:
            active = (number < end) & (carry.monitor.diverged_at == monitoring.NEVER)
            return lax.cond(active, live, idle, carry, number)

        return lax.scan(step, carry, begin + jnp.arange(self._dispatch_length, dtype=jnp.int32))

    @property
    def _dispatch_length(self) -> int:
        return min(self.config.rounds_per_dispatch or self.config.eval_every, self.config.rounds)

    @property
    def forward_passes_per_round(self) -> int:
        """Client-loss evaluations of one round: C·K·(P+1) forward, 2·C·K·P central."""
        config = self.config
        each = config.perturbations + 1 if config.method == "forward" else 2 * config.perturbations
        return config.cohort * config.local_steps * each

    def run(self) -> Result:
        """Run to the last round, to divergence, or until :meth:`stop`."""
        config = self.config
        self._stop = False
        initial = self.task.init(init_key(self._seed_key))
        state = self.tx.init(initial)
        # The carry is donated to each dispatch, so the parameters kept for the result are a copy.
        carry = RunState(jax.tree.map(jnp.copy, initial), state, monitoring.start())
        checkpoint_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((initial, state)))
        traffic = Traffic(self._population.num_clients, config.local_steps * config.perturbations, checkpoint_bytes)
        ledger = Ledger(self._seed_key)

        before = time.perf_counter()
        zero = jnp.int32(0)
        inputs = (self._seed_key, self._train, self._population)
        dispatch = jax.jit(self._dispatch, donate_argnums=0).lower(carry, zero, zero, *inputs).compile()
        evaluate = jax.jit(make_evaluate(self.task.metrics)).lower(initial, self._test).compile()
        compile_seconds = time.perf_counter() - before

        done, run_seconds, diverged_at = 0, 0.0, None
        history: list[Evaluation] = []
        losses: list[float] = []

        def take_evaluation() -> Evaluation:
            row = Evaluation(
                round=done,
                train_loss=float(np.nanmean(losses)) if np.isfinite(losses).any() else math.nan,
                metrics={name: float(value) for name, value in evaluate(carry.params, self._test).items()},
                bytes_up=traffic.bytes_up,
                bytes_down=traffic.bytes_down,
                forward_passes=done * self.forward_passes_per_round,
                seconds=run_seconds,
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
        while done < config.rounds and diverged_at is None and not self._stop:
            next_evaluation = min(config.rounds, (done // config.eval_every + 1) * config.eval_every)
            end = min(done + length, next_evaluation)
            before = time.perf_counter()
            carry, (cohorts, record) = jax.block_until_ready(dispatch(carry, jnp.int32(done), jnp.int32(end), *inputs))
            elapsed = time.perf_counter() - before
            run_seconds += elapsed
            if (flag := int(carry.monitor.diverged_at)) != monitoring.NEVER:
                diverged_at, end = flag, flag + 1
            numbers = np.arange(done, end, dtype=np.int32)
            kept = jax.tree.map(lambda column: np.asarray(column)[: len(numbers)], (cohorts, record))  # noqa: B023
            ledger.append(numbers, *kept)
            for number, participants in zip(numbers, kept[0], strict=True):
                traffic.add_round(int(number), participants)
            losses += kept[1].loss.tolist()
            if config.rounds_per_dispatch is None:
                # At most double: the first dispatches are slow for reasons that pass.
                fitting = int(DISPATCH_SECONDS * len(numbers) / elapsed)
                length = max(1, min(self._dispatch_length, 2 * length, fitting))
            done = end
            tell(take_evaluation() if done == next_evaluation else None)
        if history[-1].round != done:
            tell(take_evaluation())

        return Result(
            records=ledger.records if done else None,
            metrics=history,
            initial_params=initial,
            params=carry.params,
            state=carry.state,
            rounds=done,
            diverged_at=diverged_at,
            interrupted=done < config.rounds and diverged_at is None,
            traffic=traffic.summary(),
            forward_passes=done * self.forward_passes_per_round,
            compile_seconds=compile_seconds,
            run_seconds=run_seconds,
        )
