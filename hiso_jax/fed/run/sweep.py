"""A grid of learning rates × seeds × μ as one program, to find each method's best setting.

Every setting is a complete run. A vmapped grid computes once the arrays that its settings share: all rates and μ of a
seed share its cohorts, its batches and its random draws, which are most of the work of a small model.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.fed.algorithm import Algorithm, as_algorithm
from hiso_jax.fed.devices import ExecutionSettings, a_device, evaluation_bytes, has_convolution, memory_budget
from hiso_jax.fed.keys import init_key
from hiso_jax.fed.measure import Estimator, Projections
from hiso_jax.fed.population import AnyPopulation, Participation, check_selected
from hiso_jax.fed.round import first_memory, shapes_of
from hiso_jax.fed.run import monitor as monitoring
from hiso_jax.fed.run.buffered import check_buffer
from hiso_jax.fed.run.config import SimulationConfig
from hiso_jax.fed.run.dispatch import dispatch_for
from hiso_jax.fed.run.evaluation import make_evaluate
from hiso_jax.fed.run.grid import Grid, SweepResult
from hiso_jax.fed.run.interrupt import stopped_by_interrupt
from hiso_jax.fed.run.prepared import check_channel, estimator_of, with_defaults
from hiso_jax.fed.run.programs import bytes_of, costs_of, without_jit
from hiso_jax.fed.run.secret import as_key, fresh, of_setting
from hiso_jax.fed.run.state import Inputs, RoundLog, RunState, first_selection, nobody_at_work
from hiso_jax.fed.task import Task, at_precision, bind, examples_of, frozen_of, metric_of, perturbed_as_of, summarise
from hiso_jax.fed.task_checks import check_initial, check_task
from hiso_jax.fed.update import ServerState
from hiso_jax.program_cache import keep_compiled

MakeAlgorithm = Callable[[Any], Algorithm | optax.GradientTransformation]
"""Learning rate, a traced scalar → the method with that rate."""


# Up to this many parameters, the random draws, which settings share, are most of a model's work.
SMALL = 2**20

Watch = Callable[[tuple[int, ...], Int[np.ndarray, "R"], RoundLog], None]
"""Called with (place of a group of settings in the grid [seeds, μ, rates], round numbers, their log). The arrays of the
log have an axis for each axis of the group's settings, then the rounds."""


Programs = dict[tuple[Any, ...], tuple[Any, Any]]
"""The groups' shapes → a function that makes a group's first state, and a program that runs to the next evaluation."""


class Point(NamedTuple):
    """A setting, or several side by side with leading axes.

    Attributes:
      rate: the learning rate.
      table: the rate over the rounds, [R], or None.
      local: the rate of the clients' own steps, or None if it follows from the learning rate.
      mu: the smoothing radius.
      seed_key: the seed key of the run.
      population: the population of that seed.
    """

    rate: Any
    table: Any
    local: Any
    mu: Any
    seed_key: Any
    population: Any


def _over_rounds(point: Point) -> Any:
    """The argument that makes a setting's method: its rate, or a schedule that reads the rate of each round."""
    if point.table is None:
        return point.rate
    return lambda count: jnp.take(point.table, jnp.asarray(count, jnp.int32), mode="clip")


class _Bench(NamedTuple):
    """The parts that all settings of a sweep share."""

    task: Task
    make: MakeAlgorithm
    config: SimulationConfig
    grid: Grid
    participation: Participation
    budget: int
    side_by_side: int
    watch: Watch | None

    @property
    def keeps_log(self) -> bool:
        """Whether the log of the rounds is read: by a watch, or to check the cohorts that a rule selects."""
        return self.watch is not None or self.participation.select is not None

    def estimator(self, algorithm: Algorithm, point: Point) -> Estimator:
        rate = point.local
        if rate is None and self.grid.local_learning_rate is not None:
            rate = self.grid.local_learning_rate(_over_rounds(point))
        elif rate is None:
            # The rate of projections is independent of the server's.
            own = isinstance(algorithm.measure, Projections)
            rate = self.config.local_learning_rate if own else _over_rounds(point)
        return estimator_of(algorithm, self.config)._replace(mu=point.mu, local_learning_rate=rate)

    def start(self, initial: PyTree, point: Point) -> RunState:
        algorithm = as_algorithm(self.make(_over_rounds(point)))
        sent = shapes_of(algorithm, self.estimator(algorithm, point), initial, self.config.answers).sent
        server = ServerState(initial, algorithm.optimizer.init(initial), first_memory(algorithm, sent))
        selection = first_selection(self.participation, point.population.num_clients, self.config.answers)
        at_work, clock = nobody_at_work(self.config, sent, jnp.float32), self.participation.first_clock()
        return RunState(server, monitoring.start(), None, selection, at_work, clock)

    def segment(
        self, carry: RunState, point: Point, bounds: tuple[Array, Array], data: PyTree
    ) -> tuple[RunState, dict[str, Array], RoundLog | None]:
        """Run the rounds to the next evaluation, and evaluate; the log is None if nobody reads it."""
        algorithm, config = as_algorithm(self.make(_over_rounds(point))), self.config
        estimator, budget = self.estimator(algorithm, point), max(1, self.budget // self.side_by_side)
        # Side by side, both branches of a conditional run, so a kept Δ would be computed again anyway.
        directions = config.directions if self.side_by_side == 1 else "regenerate"
        settings = ExecutionSettings(config.client_chunk, budget, directions, perturbed_as=perturbed_as_of(self.task))
        loss, metrics = (
            at_precision(function, config.matmul_precision) for function in (self.task.loss, self.task.metrics)
        )
        train, test, frozen, secret = data
        if secret is not None:
            more = [numbers for numbers in (point.local, point.table) if numbers is not None]
            secret = of_setting(secret, point.seed_key, point.rate, point.mu, *more)
        inputs = Inputs(point.seed_key, train, point.population, self.participation, frozen, secret)
        costs = costs_of(algorithm, estimator, carry.server, config)
        length = min(config.eval_every, config.rounds)
        given = loss, algorithm, estimator, settings, config, costs
        carry, log = dispatch_for(*given, carry.server.params, length)(carry, *bounds, inputs)
        outputs = make_evaluate(metrics, budget=budget)(carry.server.params, test, frozen)
        return carry, outputs, log if self.keeps_log else None


def _stack(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *trees)


def _fits(task: Task, config: SimulationConfig, params: PyTree, state: PyTree, budget: int) -> int:
    """The number of settings that may run side by side."""
    # As arrays of the device, because a model may index them by traced integers.
    loss = bind(task.loss, jax.tree.map(jnp.asarray, frozen_of(task)))
    numbers = sum(leaf.size for leaf in jax.tree.leaves((params, frozen_of(task))))
    if a_device(None).platform == "cpu" and (numbers > SMALL or has_convolution(loss, params, task.train)):
        # Distinct weights turn convolutions into grouped ones, which are slow on CPU. So are the matrix products of a
        # language model: with 135 million parameters, three rates took 5.5 times as long side by side as in turn.
        return 1
    rows = config.answers * config.batch_size
    each = 4 * bytes_of((params, state)) + evaluation_bytes(loss, params, task.train, rows)
    return max(1, budget // each)


def _reported(task: Task, outputs: dict[str, Array], grid: tuple[int, ...]) -> dict[str, Float[np.ndarray, "..."]]:
    """The metrics of each setting of a group, from the metrics of every test example, [*grid, n, ...]."""
    host = {name: np.asarray(values) for name, values in outputs.items()}
    settings = [summarise(task, {name: values[index] for name, values in host.items()}) for index in np.ndindex(grid)]
    return {name: np.array([setting[name] for setting in settings]).reshape(grid) for name in settings[0]}


@dataclass(frozen=True)
class _Groups:
    """The settings of a sweep in groups that run side by side: all settings, the rates of a seed and μ, or one setting.

    Attributes:
      initials: the initial parameters of every seed.
      points: the entire grid, [S] populations and seed keys, [M] radii, [L] rates.
      axes: the number of vmapped axes: 0, 1 (rates) or 3 (rates, radii and seeds).
    """

    initials: list[PyTree]
    points: Point
    axes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(S, M, L)."""
        return len(self.initials), len(self.points.mu), len(self.points.rate)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        """The place of each group in the grid: (), (seed, μ) or (seed, μ, rate)."""
        return iter(np.ndindex(self.shape[: 3 - self.axes]))

    def over(self, function: Callable, carry: int | None, shared: int) -> Callable:
        """``function(carry, point, *shared)`` over the settings of a group.

        Args:
          function: a function of one setting.
          carry: the axis of settings in its first argument; None if that differs only between seeds.
          shared: the number of arguments that all settings share.
        """
        if self.axes == 0:
            return function
        rest = (None,) * shared
        over_rates = jax.vmap(function, (carry, Point(0, 0, 0, None, None, None), *rest))
        if self.axes == 1:
            return over_rates
        over_radii = jax.vmap(over_rates, (carry, Point(None, None, None, 0, None, None), *rest))
        return jax.vmap(over_radii, (0, Point(None, None, None, None, 0, 0), *rest))

    def at(self, group: tuple[int, ...]) -> tuple[PyTree, Point]:
        """The initial parameters and the grid values of a group."""
        points = self.points
        if not group:
            return _stack(self.initials), points._replace(
                seed_key=jnp.stack(points.seed_key), population=_stack(points.population)
            )
        seed, mu, *rate = group
        population = jax.tree.map(jnp.asarray, points.population[seed])
        of_rates = points.rate, points.table, points.local
        if rate:
            of_rates = jax.tree.map(lambda values: values[rate[0]], of_rates)
        return self.initials[seed], Point(*of_rates, points.mu[mu], points.seed_key[seed], population)


def sweep(
    task: Task,
    make: MakeAlgorithm,
    populations: Sequence[AnyPopulation],
    config: SimulationConfig,
    grid: Grid,
    *,
    participation: Participation | None = None,
    callback: Callable[[int, int], Any] = lambda done, rounds: None,
    watch: Watch | None = None,
    programs: Programs | None = None,
) -> SweepResult:
    """Run every setting of a grid, in one compiled program.

    The settings run side by side (vmapped) if they fit the memory budget and the model suits it: all settings, or else
    the rates of one seed and μ. Otherwise one program runs them in turn, with one setting in memory at a time.
    A sweep keeps no ledger and counts no bytes. Its clients never have missed rounds to catch up on: under a deadline
    or with a buffer, a run of the same setting may therefore count other answers.
    In a program that does not handle Ctrl-C itself, the first Ctrl-C ends the sweep after its next evaluation, and the
    result says so; the second ends the program.

    Args:
      task: the task, with the tuning split as its test split.
      make: learning rate, a traced scalar → algorithm or optimizer.
      populations: one population for each seed.
      config: the configuration of the runs; the grid replaces its seed, μ and local learning rate.
      grid: the settings.
      participation: as in :class:`hiso_jax.fed.Simulation`.
      callback: called with (rounds done, rounds) after each evaluation; the sweep ends if it returns True.
      watch: called with the log of the rounds, see :data:`Watch`; there is then no evaluation before the first round.
      programs: compiled programs of earlier sweeps of the same task, method, configuration and participation, by the
        shapes of their grids; new programs are added.

    Raises:
      ValueError: the number of populations is not the number of seeds; the method or the participation does not fit an
        asynchronous run; or a rule selects a client twice, or one that does not exist.
    """
    keep_compiled()
    if len(populations) != len(grid.seeds):
        raise ParameterError(
            "populations", f"must be one for each of the {len(grid.seeds)} seeds, got {len(populations)}"
        )
    participation = Participation() if participation is None else participation
    check_task(task)
    for population in populations:
        population.check(examples_of(task.train))
        participation.check(population.num_clients)
    grid = replace(grid, mus=(config.mu,) if grid.mus is None else grid.mus)
    seed_keys = [jax.random.key(seed) for seed in grid.seeds]
    initials = [task.init(init_key(key)) for key in seed_keys]
    check_initial(initials)
    budget = memory_budget() if config.memory_budget is None else config.memory_budget
    algorithm = as_algorithm(make(grid.learning_rates[0]))
    check_channel(algorithm, config, participation, populations[0].num_clients)
    check_buffer(algorithm, config, initials[0], participation)
    config = with_defaults(algorithm, config)
    state = algorithm.optimizer.init(initials[0])
    fitting, rates = _fits(task, config, initials[0], state, budget), len(grid.learning_rates)
    settings = len(grid.seeds) * len(grid.mus or ()) * rates
    axes, side_by_side = (3, settings) if fitting >= settings else (1, rates) if fitting >= rates else (0, 1)
    all_rates, radii = jnp.asarray(grid.learning_rates, jnp.float32), jnp.asarray(grid.mus, jnp.float32)
    tables = None if grid.over_rounds is None else jnp.asarray(grid.over_rounds, jnp.float32)
    local = None if grid.local_rates is None else jnp.asarray(grid.local_rates, jnp.float32)
    groups = _Groups(initials, Point(all_rates, tables, local, radii, seed_keys, list(populations)), axes)
    bench = _Bench(task, make, config, grid, participation, budget, side_by_side, watch)
    stopped: list[bool] = []

    def stops(done: int, rounds: int) -> bool:
        return (callback(done, rounds) is True) or bool(stopped)

    with stopped_by_interrupt("the sweep ends after its next evaluation", lambda: stopped.append(True)):
        return _run(bench, groups, stops, {} if programs is None else programs)


def _run(bench: _Bench, groups: _Groups, stops: Callable[[int, int], bool], programs: Programs) -> SweepResult:
    task, config, shape = bench.task, bench.config, groups.shape
    length = min(config.eval_every, config.rounds)
    # Side by side, rounds that a dispatch skips are computed anyway, so a watch skips the evaluation before round 0.
    ends = [*([0] if bench.watch is None else []), *range(length, config.rounds, length), config.rounds]
    algorithm = as_algorithm(bench.make(bench.grid.learning_rates[0]))
    # An argument of the program, never a constant, because compiled programs are kept.
    secret = as_key(fresh()) if algorithm.needs_secret else None
    data = (*jax.tree.map(jnp.asarray, (task.train, task.test, frozen_of(task))), secret)
    diverged_at = np.full(shape, monitoring.NEVER)
    metrics: dict[str, np.ndarray] = {}
    compile_seconds, run_seconds, reached, interrupted = 0.0, 0.0, 0, False
    # All settings that run in turn use one program.
    kinds = groups.points.table is None, groups.points.local is None
    key, listed = (groups.axes, *shape[3 - groups.axes :], *kinds), list(groups)
    start, program = programs.get(key, (None, None))
    start = start or jax.jit(groups.over(bench.start, None, 0))
    for number, group in enumerate(listed):
        initial, point = groups.at(group)
        # Only one group's parameters and curvatures exist at a time.
        carry, bounds = start(initial, point), (jnp.int32(0), jnp.int32(0))
        if program is None:
            before = time.perf_counter()
            segment = groups.over(bench.segment, 0, 2)
            if without_jit():
                program = segment
            else:
                program = jax.jit(segment, donate_argnums=0).lower(carry, point, bounds, data).compile()
            programs[key] = start, program
            compile_seconds = time.perf_counter() - before
        done = 0
        for place, end in enumerate(ends):
            before = time.perf_counter()
            bounds = jnp.int32(done), jnp.int32(end)
            carry, outputs, log = jax.block_until_ready(program(carry, point, bounds, data))
            run_seconds += time.perf_counter() - before
            if bench.keeps_log and end > done:
                kept = (slice(None),) * (3 - len(group)) + (slice(0, end - done),)
                rounds = np.arange(done, end, dtype=np.int32)
                rows = jax.tree.map(lambda column, kept=kept: column[kept], log.on_host())
                if bench.participation.select is not None:
                    for cohorts in rows.cohort.reshape(-1, *rows.cohort.shape[-2:]):
                        check_selected(rounds, cohorts, groups.points.population[0].num_clients)
                if bench.watch is not None:
                    bench.watch(group, rounds, rows)
            done, reached = end, max(reached, place + 1)
            where: tuple[Any, ...] = (*group, ..., place)
            for name, column in _reported(task, outputs, shape[len(group) :]).items():
                metrics.setdefault(name, np.full((*shape, len(ends)), np.nan))[where] = column
            interrupted = stops((number * config.rounds + done) // len(listed), config.rounds)
            if interrupted:
                break
        diverged_at[group] = np.asarray(carry.monitor.diverged_at)
        del carry, outputs
        interrupted = interrupted and (done < config.rounds or number + 1 < len(listed))
        if interrupted:
            break
    return SweepResult(
        seeds=tuple(bench.grid.seeds),
        mus=tuple(bench.grid.mus or ()),
        learning_rates=tuple(bench.grid.learning_rates),
        local_rates=None if bench.grid.local_rates is None else tuple(bench.grid.local_rates),
        rounds=np.array(ends[:reached]),
        metric=metric_of(task, metrics),
        metrics={name: values[..., :reached] for name, values in metrics.items()},
        diverged_at=diverged_at,
        interrupted=interrupted,
        compile_seconds=compile_seconds,
        run_seconds=run_seconds,
    )
