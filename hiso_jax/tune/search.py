"""Tuning: the data that a sweep and a comparison may read, and a search with the same number of runs per method."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from hiso_jax import fed
from hiso_jax.algorithms import Method
from hiso_jax.checks import ParameterError, first_line, positive
from hiso_jax.experiment import (
    build_algorithm,
    build_population,
    build_schedule,
    first_guess,
    local_rates,
    own_local_rate,
    participation_of,
    recorded_algorithm,
    simulation_config,
    target_of,
)
from hiso_jax.fed.ledger import exists, read_regular
from hiso_jax.fed.task import examples_of
from hiso_jax.reports import write_json
from hiso_jax.tune.directory import writing
from hiso_jax.tune.settings import Compare, Study
from hiso_jax.tune.watcher import Watcher

VALIDATION_SHARE = 0.2
# Added to --seed: far from the reported seeds, which count up from --seed.
FIRST_TUNING_SEED = 10_000
RESULTS = "tuning.json"


class Held:
    """A task with held-out training examples as its test split, and the populations of the other examples."""

    def __init__(self, settings: Study, task: Any, seeds: Sequence[int]) -> None:
        """Hold out the validation examples and assign the rest to the clients, once for each seed.

        Raises:
          ValueError: too many or too few examples are held out, or too few are left for the clients.
        """
        total = examples_of(task.train)
        held = round(VALIDATION_SHARE * total) if settings.validation is None else settings.validation
        if not 1 <= held < total:
            raise ParameterError(
                "validation", f"must be at least 1 and below {total}, the training examples; got {held}"
            )
        self.task = fed.hold_out(task, held, seed=settings.seed)
        self.target = target_of(settings, task)
        self.seeds = list(seeds)
        self.populations = [build_population(settings, self.task, seed) for seed in self.seeds]
        self.participation = participation_of(settings)

    def sweep(
        self, settings: Study, method: Method, rates: Sequence[float], watcher: Watcher, mus: Sequence[float] | None
    ) -> fed.SweepResult:
        """Run a method with several rates (and clients' rates), several radii and every seed, as one program."""
        algorithm = recorded_algorithm(settings, method, rates[0])
        grid = fed.Grid(rates, self.seeds, mus, local_rates(settings, algorithm))
        own = getattr(settings, "local_learning_rates", None)
        if own and algorithm.has_scalars and (settings.local_steps or algorithm.local_steps or 1) > 1:
            pairs = [(rate, each) for each in own for rate in rates]
            grid = fed.Grid([rate for rate, _ in pairs], self.seeds, mus, local_rates=[each for _, each in pairs])
        count = len(self.seeds) * len(mus or (0,)) * len(grid.learning_rates)
        title = (
            f"{settings.task} {method.name}: {_settings(count)} of {settings.rounds} rounds, {settings.schedule} rate"
        )
        return self._run(settings, method, grid, title, watcher)

    def search(
        self, settings: Study, method: Method, rates: Sequence["Candidate"], watcher: Watcher, programs: Any
    ) -> fed.SweepResult:
        """Run a method with several candidates and every seed, by a program that can run other candidates, too."""
        numbers = [each.learning_rate for each in rates]
        local = local_rates(settings, recorded_algorithm(settings, method, numbers[0]))
        table = np.stack(
            [_over_rounds(replace(settings, schedule=each.schedule), each.learning_rate) for each in rates]
        )
        own = None if rates[0].local is None else [each.local or 0.0 for each in rates]
        grid = fed.Grid(numbers, self.seeds, None, local, table, own)
        count = len(self.seeds) * len(rates)
        title = f"{settings.task} {method.name}: {_settings(count)} of {settings.rounds} rounds"
        return self._run(settings, method, grid, title, watcher, programs)

    def _run(
        self, settings: Study, method: Method, grid: fed.Grid, title: str, watcher: Watcher, programs: Any = None
    ) -> fed.SweepResult:
        algorithm = recorded_algorithm(settings, method, grid.learning_rates[0])
        with watcher.searching(title, settings.rounds) as step:
            return fed.sweep(
                self.task,
                lambda rate: build_algorithm(settings, method, rate, seeds=self.seeds),
                self.populations,
                simulation_config(settings, settings.seed, algorithm),
                grid,
                participation=self.participation,
                callback=step,
                programs=programs,
            )


def _settings(count: int) -> str:
    return f"{count} setting{'' if count == 1 else 's'}"


def _over_rounds(settings: Study, rate: float) -> Float[np.ndarray, "R"]:
    """The learning rate of each round."""
    schedule = build_schedule(settings, rate)
    if not callable(schedule):
        return np.full(settings.rounds, schedule, np.float32)
    return np.asarray(jax.vmap(schedule)(jnp.arange(settings.rounds)), np.float32)


class Candidate(NamedTuple):
    """A setting to try.

    Attributes:
      schedule: the schedule of the learning rate over the rounds.
      local: the rate of the clients' own steps; None if it follows from the learning rate.
      learning_rate: the learning rate.
    """

    schedule: str
    local: float | None
    learning_rate: float


@dataclass(frozen=True)
class Trial:
    """A learning rate and a schedule that were tried.

    Attributes:
      algorithm: the method's name.
      schedule: the schedule of the rate over the rounds.
      learning_rate: the rate.
      rounds_to_target: rounds to the target for every tuning seed; None if it was not reached or there is no target.
      final: the metric at the end, for every tuning seed; None where the run diverged.
      diverged: the number of runs that diverged.
      local_learning_rate: the rate of the clients' own steps; None if it follows from the learning rate.
    """

    algorithm: str
    schedule: str
    learning_rate: float
    rounds_to_target: list[float | None]
    final: list[float | None]
    diverged: int
    local_learning_rate: float | None = None

    def score(self, metric: fed.Metric, *, by_target: bool) -> tuple[float, float]:
        """A score to minimize: mean rounds to the target, infinite if a seed missed it; then the mean final value."""
        reached = [rounds for rounds in self.rounds_to_target if rounds is not None]
        soon = by_target and len(reached) == len(self.rounds_to_target) > 0
        return float(np.mean(reached)) if soon else math.inf, -metric.sign * self.mean_final(metric)

    def mean_final(self, metric: fed.Metric) -> float:
        """The mean of the final values; a run that diverged has the metric's worst value."""
        return float(np.mean([metric.worst if final is None else final for final in self.final]))


@dataclass(frozen=True)
class Kept:
    """The content of ``tuning.json``: the metric that counts, the target, and all trials."""

    metric: str
    higher_is_better: bool
    target: float | None
    trials: list[Trial]


@dataclass(frozen=True)
class Tuned:
    """The rate and schedule of a method.

    Attributes:
      learning_rate, schedule: the best pair that was tried.
      trials: all trials; empty if the rate was given.
      at_edge: whether the best rate is the smallest or the largest that was tried with its schedule.
      local_learning_rate: the best rate of the clients' own steps, if that was tuned, too.
    """

    learning_rate: float
    schedule: str
    trials: tuple[Trial, ...] = ()
    at_edge: bool = False
    local_learning_rate: float | None = None


class Search:
    """The tuning of a comparison: the same number of runs for each method, saved in ``tuning.json`` as they end."""

    def __init__(self, settings: Compare, task: Any, watcher: Watcher) -> None:
        """Prepare the data.

        Raises:
          ValueError: see :class:`Held`.
        """
        first = settings.seed + FIRST_TUNING_SEED
        # The robustness protocol tunes with all clients present.
        calm = settings.in_calm() if settings.protocol == "robustness" else settings
        self.held = Held(calm, task, range(first, first + settings.tuning_seeds))
        self.settings, self.watcher = calm, watcher
        self.directory: Path | None = None
        self.metric: fed.Metric | None = None
        self.trials: list[Trial] = []

    def begin(self, directory: Path) -> None:
        """Use ``directory`` from now on, and read the trials in it.

        Raises:
          ParameterError: ``tuning.json`` was altered.
        """
        self.directory = directory
        if not exists(directory / RESULTS, "resume"):
            return
        from pydantic import TypeAdapter

        try:
            content = TypeAdapter(Kept).validate_json(read_regular(directory / RESULTS))
            for trial in content.trials:
                positive("learning_rate", trial.learning_rate)
                if trial.schedule not in self.settings.schedules:
                    raise ValueError(f"a trial has another schedule, {trial.schedule}")
                if {len(trial.final), len(trial.rounds_to_target)} != {len(self.held.seeds)}:
                    raise ValueError(f"a trial does not have {len(self.held.seeds)} runs")
        except (ValueError, RecursionError) as error:
            reason = first_line(error)
            raise ParameterError(
                "resume", f"must be a directory whose {RESULTS} is as it was written ({reason})"
            ) from error
        self.trials = content.trials
        self.metric = fed.Metric(content.metric, content.higher_is_better)

    def tune(self, method: Method, rounds: int, eval_every: int) -> Tuned | None:
        """Try rates with every schedule, by one compiled program; None if it was interrupted."""
        assert self.directory is not None
        # Another process may have tried rates of this method before it was ended.
        with writing(self.directory):
            self.begin(self.directory)
        settings = replace(self.settings, rounds=rounds, eval_every=eval_every)
        # The next rates of all variants are tried side by side; groups of equal size share one compiled program.
        width, programs = len(settings.schedules), fed.Programs()
        while wanted := self._next(settings, method):
            if not self._try(settings, method, wanted[:width], width, programs):
                return None
        own = [trial for trial in self.trials if trial.algorithm == method.name]
        best = min(own, key=self._score)
        variant = best.schedule, best.local_learning_rate
        rates = [trial.learning_rate for trial in own if (trial.schedule, trial.local_learning_rate) == variant]
        at_edge = len(rates) > 1 and best.learning_rate in (min(rates), max(rates))
        return Tuned(best.learning_rate, best.schedule, tuple(own), at_edge, best.local_learning_rate)

    def _score(self, trial: Trial) -> tuple[float, float]:
        assert self.metric is not None
        by_target = self.settings.protocol != "quality-under-budget" and self.held.target is not None
        return trial.score(self.metric, by_target=by_target)

    def _next(self, settings: Compare, method: Method) -> list[Candidate]:
        """The candidates to try next, alternating between variants."""
        wanted = [
            [Candidate(*variant, rate) for rate in self._wanted(settings, method, variant)]
            for variant in self._variants(settings, method)
        ]
        return [each for several in zip_longest(*wanted) for each in several if each is not None]

    def _variants(self, settings: Compare, method: Method) -> list[tuple[str, float | None]]:
        """The (schedule, local rate) pairs whose rates are searched, the same number for every method.

        A method whose clients have a rate of their own tries several of these in place of the schedules.
        """
        own = own_local_rate(settings, recorded_algorithm(settings, method, first_guess(settings, method)))
        if own is None or settings.local_learning_rate is not None:
            return [(name, None) for name in settings.schedules]
        # 1, 1/2, 2, 1/4, 4, … times the task's own.
        factors = [2.0 ** ((place + 1) // 2 * (-1) ** place) for place in range(len(settings.schedules))]
        return [(settings.schedules[0], float(f"{factor * own:.3g}")) for factor in factors]

    def _wanted(self, settings: Compare, method: Method, variant: tuple[str, float | None]) -> list[float]:
        """The rates to try next with a variant; empty when its tries are used up."""
        tried = {
            trial.learning_rate: self._score(trial)
            for trial in self.trials
            if (trial.algorithm, trial.schedule, trial.local_learning_rate) == (method.name, *variant)
        }
        if settings.rates:
            return [rate for rate in settings.rates if rate not in tried]
        left = settings.tries - len(tried)
        first = fed.next_rates({}, first_guess(settings, method))
        # The first three rates do not depend on each other's results.
        wanted = [rate for rate in first if rate not in tried]
        return (wanted or fed.next_rates(tried, first_guess(settings, method)))[:left] if left > 0 else []

    def _try(
        self, settings: Compare, method: Method, rates: Sequence[Candidate], width: int, programs: fed.Programs
    ) -> bool:
        # The last candidate is repeated if fewer are left.
        padded = [*rates, *[rates[-1]] * (width - len(rates))]
        result = self.held.search(settings, method, padded, self.watcher, programs)
        if result.interrupted:
            return False
        new, target = [], self.held.target
        final = result.final()[:, 0]
        first = np.full(final.shape, np.inf) if target is None else result.rounds_to(target)[:, 0]
        for place, (schedule, local, rate) in enumerate(rates):
            reached = [float(each) if np.isfinite(each) else None for each in first[:, place]]
            diverged = int((result.diverged_at[:, 0, place] >= 0).sum())
            ends = [float(each) if np.isfinite(each) else None for each in final[:, place]]
            new.append(Trial(method.name, schedule, rate, reached, ends, diverged, local))
        assert self.directory is not None
        with writing(self.directory):
            self.begin(self.directory)
            self.trials += new
            self.metric = result.metric
            write_json(self.directory / RESULTS, as_content(self.trials, self.metric, self.held.target))
        return True


def as_content(trials: Sequence[Trial], metric: fed.Metric, target: float | None) -> Mapping[str, Any]:
    """Trials in the form of ``tuning.json``."""
    judged = {"metric": metric.name, "higher_is_better": metric.higher_is_better, "target": target}
    return {**judged, "trials": [asdict(trial) for trial in trials]}


def how_tuned(method: str, tuned: Tuned, metric: fed.Metric, target: float | None) -> str:
    """One sentence: the best rate, the number of runs, and whether more rates should be tried."""
    best = next(
        trial
        for trial in tuned.trials
        if (trial.learning_rate, trial.schedule, trial.local_learning_rate)
        == (tuned.learning_rate, tuned.schedule, tuned.local_learning_rate)
    )
    words = metric.name.replace("_", " ")
    rounds, final = best.score(metric, by_target=True)[0], best.mean_final(metric)
    soon = f"{words} {target:g} after {rounds:.0f} rounds, " if target is not None and math.isfinite(rounds) else ""
    missed = f"; {target:g} not reached with every seed" if target is not None and not soon else ""
    edge = " (the edge of what was tried: more --tries may do better)" if tuned.at_edge else ""
    runs = len(tuned.trials) * len(best.final)
    local = "" if tuned.local_learning_rate is None else f", clients' rate {tuned.local_learning_rate:g}"
    return (
        f"{method}: of {runs} runs best at rate {tuned.learning_rate:g}, {tuned.schedule}{local}{edge}: {soon}{words} "
        f"{final:.4f} at the end{missed}"
    )
