"""A grid of learning rates × seeds × μ as one program, to find each method's best setting.

Every setting is a whole run of its own. In a vmapped grid what does not differ between settings is done once: all
rates and μ of a seed share its cohorts, its batches and its random draws, which are most of the work of a small
model.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from hiso_jax.fed.devices import evaluation_bytes, has_convolution, memory_budget
from hiso_jax.fed.keys import init_key
from hiso_jax.fed.population import AnyPopulation, Participation
from hiso_jax.fed.round import make_round
from hiso_jax.fed.run import monitor as monitoring
from hiso_jax.fed.run.config import SimulationConfig, positive
from hiso_jax.fed.run.dispatch import Inputs, RunState, checkpoint_bytes, draw_batches, make_dispatch
from hiso_jax.fed.run.evaluation import first_at_target, make_evaluate
from hiso_jax.fed.task import Task, bind, frozen_of, summarise

MakeOptimizer = Callable[[Any], optax.GradientTransformation]
LAST_EVALUATIONS = 3


@dataclass(frozen=True)
class Best:
    """The setting that a sweep found best.

    Attributes:
      learning_rate, mu: the setting.
      rounds_to_target: the mean over the seeds; None if no setting reached the target with every seed, in which
        case it is the setting of the highest final value.
      final: the metric at the end, the mean of the last three evaluations and of the seeds.
      at_edge: whether the rate is the smallest or the largest of several tried.
    """

    learning_rate: float
    mu: float
    rounds_to_target: float | None
    final: float
    at_edge: bool


@dataclass(frozen=True)
class SweepResult:
    """What a sweep leaves behind: S seeds, M values of μ, L learning rates, E evaluations.

    Attributes:
      seeds, mus, learning_rates: the grid.
      rounds: the rounds of the evaluations, [E].
      metrics: the task's metrics on its test split, each [S, M, L, E]; NaN where an interrupt came first.
      diverged_at: the round at which a run diverged or -1, [S, M, L].
      interrupted: whether the sweep was stopped before its last round.
      compile_seconds, run_seconds: time spent.
    """

    seeds: tuple[int, ...]
    mus: tuple[float, ...]
    learning_rates: tuple[float, ...]
    rounds: Int[np.ndarray, "E"]
    metrics: dict[str, Float[np.ndarray, "S M L E"]]
    diverged_at: Int[np.ndarray, "S M L"]
    interrupted: bool
    compile_seconds: float
    run_seconds: float

    def final(self, metric: str = "accuracy") -> Float[np.ndarray, "S M L"]:
        """The mean of each run's last three evaluations; zero for a run that diverged or did not come so far."""
        values = self.metrics[metric][..., -LAST_EVALUATIONS:].mean(-1)
        return np.where((self.diverged_at == monitoring.NEVER) & np.isfinite(values), values, 0.0)

    def rounds_to(self, target: float, metric: str = "accuracy") -> Float[np.ndarray, "S M L"]:
        """The round at which each run reached ``target`` (see ``first_at_target``), or infinity."""
        first = np.full(self.diverged_at.shape, math.inf)
        for index in np.ndindex(first.shape):
            reached = first_at_target(self.metrics[metric][index].tolist(), target)
            if reached is not None and self.diverged_at[index] == monitoring.NEVER:
                first[index] = self.rounds[reached]
        return first

    def best(self, target: float | None, metric: str = "accuracy") -> Best:
        """The setting that reaches the shared target soonest with every seed; else, that ends highest."""
        final = self.final(metric).mean(0)
        first = np.full(final.shape, math.inf) if target is None else self.rounds_to(target, metric).mean(0)
        reached = bool(np.isfinite(first).any())
        # Of settings that are equally soon, the one that ends higher.
        order = np.lexsort((-final.reshape(-1), first.reshape(-1)))
        m, rate = np.unravel_index(order[0], final.shape)
        return Best(
            learning_rate=self.learning_rates[rate],
            mu=self.mus[m],
            rounds_to_target=float(first[m, rate]) if reached else None,
            final=float(final[m, rate]),
            at_edge=len(self.learning_rates) > 1
            and self.learning_rates[rate] in (min(self.learning_rates), max(self.learning_rates)),
        )


def _stack(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *trees)


def _on_device(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.asarray, tree)


def _fits(task: Task, config: SimulationConfig, params: PyTree, state: PyTree, budget: int) -> int:
    """How many settings may run side by side."""
    loss = bind(task.loss, frozen_of(task))
    if jax.default_backend() == "cpu" and has_convolution(loss, params, task.train):
        # Distinct weights make grouped convolutions of them, which are slow on CPU.
        return 1
    rows = config.cohort * config.batch_size
    each = 4 * checkpoint_bytes(params, state) + evaluation_bytes(loss, params, task.train, rows)
    return max(1, budget // each)


def _reported(task: Task, outputs: dict[str, Array], grid: tuple[int, ...]) -> dict[str, Float[np.ndarray, "..."]]:
    """The reported metrics of a group of settings, from the metrics of every test example, [*grid, n, ...]."""
    host = {name: np.asarray(values) for name, values in outputs.items()}
    settings = [summarise(task, {name: values[index] for name, values in host.items()}) for index in np.ndindex(grid)]
    return {name: np.array([setting[name] for setting in settings]).reshape(grid) for name in settings[0]}


def sweep(
    task: Task,
    make_tx: MakeOptimizer,
    populations: Sequence[AnyPopulation],
    config: SimulationConfig,
    *,
    learning_rates: Sequence[float],
    seeds: Sequence[int] = (0,),
    mus: Sequence[float] | None = None,
    local_learning_rate: Callable[[Any], optax.ScalarOrSchedule] = lambda rate: rate,
    participation: Participation | None = None,
    callback: Callable[[int, int], None] = lambda done, rounds: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> SweepResult:
    """Run every setting of a grid, in one compiled program.

    The settings run side by side (vmapped) if they fit the memory budget and the model suits it, all of them or
    else the rates of one seed and μ; otherwise one program runs them in turn, and one setting is in memory at a time.
    A sweep keeps no ledger and counts no bytes; under a
    deadline its clients are never behind.

    Args:
      task: with the split on which to tune as its test split.
      make_tx: learning rate, a traced scalar → optimizer.
      populations: one for each seed.
      config: the runs' numbers; its seed, μ and local learning rate give way to the grid's.
      learning_rates: the rates to try, L.
      seeds: the seeds to try, S.
      mus: the smoothing radii to try, M; None means the config's.
      local_learning_rate: the grid's rate → the rate of the clients' own steps.
      participation: as in :class:`hiso_jax.fed.Simulation`.
      callback: told (rounds done, rounds) after each evaluation.
      should_stop: asked after each evaluation.

    Raises:
      ValueError: an empty grid, a rate or μ out of range, or a number of populations other than of seeds.
    """
    mus = (config.mu,) if mus is None else mus
    for option, values in (("learning_rates", learning_rates), ("mus", mus)):
        for value in values:
            positive(option, value)
        if not len(values):
            raise ValueError(f"{option} must name at least one value")
    if len(populations) != len(seeds) or not seeds:
        raise ValueError(f"populations must be one for each of the {len(seeds)} seeds, got {len(populations)}")
    participation = Participation() if participation is None else participation
    for population in populations:
        population.check(jax.tree.leaves(task.train)[0].shape[0])
        participation.check(population.num_clients)
    length = min(config.eval_every, config.rounds)
    seed_keys = [jax.random.key(seed) for seed in seeds]
    initials = [task.init(init_key(key)) for key in seed_keys]
    budget = memory_budget() if config.memory_budget is None else config.memory_budget
    settings = len(seeds) * len(mus) * len(learning_rates)
    fitting = _fits(task, config, initials[0], make_tx(learning_rates[0]).init(initials[0]), budget)
    rates_vmapped, all_vmapped = fitting >= len(learning_rates), fitting >= settings
    side_by_side = settings if all_vmapped else len(learning_rates) if rates_vmapped else 1

    def together(function: Callable, carry: int | None) -> Callable:
        """``function(carry, rate, μ, seed_key, population, begin, end, data)`` over a group of settings."""
        if not rates_vmapped:
            return function
        over_rates = jax.vmap(function, (carry, 0, None, None, None, None, None, None))
        if not all_vmapped:
            return over_rates
        over_radii = jax.vmap(over_rates, (carry, None, 0, None, None, None, None, None))
        return jax.vmap(over_radii, (0, None, None, 0, 0, None, None, None))

    def start(initial: PyTree, rate: Array, *_: Any) -> RunState:
        return RunState(initial, make_tx(rate).init(initial), monitoring.start(), None)

    def segment(
        carry: RunState,
        rate: Array,
        mu: Array,
        seed_key: Array,
        population: AnyPopulation,
        begin: Array,
        end: Array,
        data: PyTree,
    ) -> tuple[RunState, dict[str, Array]]:
        run_round = make_round(
            task.loss,
            optax.with_extra_args_support(make_tx(rate)),
            local_steps=config.local_steps,
            num_perturbations=config.perturbations,
            mu=mu,
            method=config.method,
            local_learning_rate=local_learning_rate(rate),
            client_chunk=config.client_chunk,
            memory_budget=max(1, budget // side_by_side),
            draw=draw_batches(config),
            # Side by side both branches of a conditional are run: a kept Δ would be made again all the same.
            directions=config.directions if side_by_side == 1 else "regenerate",
        )
        train, test, frozen = data
        inputs = Inputs(seed_key, train, population, participation, frozen)
        carry, _ = make_dispatch(run_round, config, length)(carry, begin, end, inputs)
        return carry, make_evaluate(task.metrics, budget=budget // side_by_side)(carry.params, test, frozen)

    all_rates, all_radii = jnp.asarray(learning_rates, jnp.float32), jnp.asarray(mus, jnp.float32)
    data = jax.tree.map(jnp.asarray, (task.train, task.test, frozen_of(task)))

    def inputs_of(group: tuple[int, ...]) -> tuple[PyTree, tuple]:
        """The initial parameters and the grid's values of the settings that run together, [] or [L] or [S, M, L]."""
        if not group:
            return _stack(initials), (all_rates, all_radii, jnp.stack(seed_keys), _stack(populations))
        seed, mu, *rate = group
        own_rates = all_rates[rate[0]] if rate else all_rates
        return initials[seed], (own_rates, all_radii[mu], seed_keys[seed], _on_device(populations[seed]))

    shape = len(seeds), len(mus), len(learning_rates)
    groups: list[tuple[int, ...]] = list(np.ndindex(shape[: 0 if all_vmapped else 2 if rates_vmapped else 3]))
    ends = [0, *range(length, config.rounds, length), config.rounds]
    diverged_at = np.full(shape, monitoring.NEVER)
    metrics: dict[str, np.ndarray] = {}
    program, compile_seconds, run_seconds, reached, interrupted = None, 0.0, 0.0, 0, False
    begin_group, zero = jax.jit(together(start, None)), jnp.int32(0)
    for number, group in enumerate(groups):
        initial, grid = inputs_of(group)
        # One group's parameters and curvatures exist at a time.
        carry = begin_group(initial, *grid, zero, zero, None)
        if program is None:
            before = time.perf_counter()
            program = jax.jit(together(segment, 0), donate_argnums=0).lower(carry, *grid, zero, zero, data).compile()
            compile_seconds = time.perf_counter() - before
        done = 0
        for place, end in enumerate(ends):
            before = time.perf_counter()
            carry, outputs = jax.block_until_ready(program(carry, *grid, jnp.int32(done), jnp.int32(end), data))
            run_seconds += time.perf_counter() - before
            done, reached = end, max(reached, place + 1)
            where: tuple[Any, ...] = (*group, ..., place)
            for name, column in _reported(task, outputs, shape[len(group) :]).items():
                metrics.setdefault(name, np.full((*shape, len(ends)), np.nan))[where] = column
            callback((number * config.rounds + done) // len(groups), config.rounds)
            interrupted = should_stop()
            if interrupted:
                break
        diverged_at[group] = np.asarray(carry.monitor.diverged_at)
        del carry, outputs
        interrupted = interrupted and (done < config.rounds or number + 1 < len(groups))
        if interrupted:
            break
    return SweepResult(
        seeds=tuple(seeds),
        mus=tuple(mus),
        learning_rates=tuple(learning_rates),
        rounds=np.array(ends[:reached]),
        metrics={name: values[..., :reached] for name, values in metrics.items()},
        diverged_at=diverged_at,
        interrupted=interrupted,
        compile_seconds=compile_seconds,
        run_seconds=run_seconds,
    )
