"""Tuning: what a sweep and a comparison may look at, and the search that costs every method the same number of runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from hiso_jax import fed
from hiso_jax.algorithms import Method
from hiso_jax.checks import ParameterError, first_line, positive
from hiso_jax.cli import exit_codes
from hiso_jax.cli.claims import writing
from hiso_jax.cli.comparing import Compare
from hiso_jax.cli.interrupt import stop_on_interrupt
from hiso_jax.cli.study import Study
from hiso_jax.experiment import (
    build_algorithm,
    build_population,
    build_schedule,
    first_guess,
    participation_of,
    recorded_algorithm,
    simulation_config,
    target_of,
)
from hiso_jax.fed.ledger import exists, read_regular
from hiso_jax.fed.task import examples_of
from hiso_jax.reports import write_json

VALIDATION_SHARE = 0.2
# Far from the seeds that are reported, which count up from --seed.
FIRST_TUNING_SEED = 10_000
RESULTS = "tuning.json"


class Held:
    """A task without its test split, and who holds what is left of the training examples."""

    def __init__(self, options: Study, task: Any, seeds: Sequence[int]) -> None:
        """Hold the validation examples out and deal the rest to the clients, once for each seed.

        Raises:
          ValueError: too many or too few examples held out, or too few left for the clients.
        """
        total = examples_of(task.train)
        held = round(VALIDATION_SHARE * total) if options.validation is None else options.validation
        if not 1 <= held < total:
            raise ParameterError(
                "validation", f"must be at least 1 and below {total}, the training examples; got {held}"
            )
        self.task = fed.hold_out(task, held, seed=options.seed)
        self.target = target_of(options, task)
        self.seeds = list(seeds)
        self.populations = [build_population(options, self.task, seed) for seed in self.seeds]
        self.participation = participation_of(options)

    def sweep(
        self,
        options: Study,
        method: Method,
        rates: Sequence[float],
        console: Console,
        *,
        mus: tuple[float, ...] | None = None,
    ) -> fed.SweepResult:
        """Run a method with some rates and every seed, showing how far it is."""
        stopped = False

        def stop() -> None:
            nonlocal stopped
            stopped = True

        def tell(done: int, rounds: int) -> bool:
            bar.update(row, completed=done, total=rounds)
            return stopped

        figures = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn())
        algorithm = recorded_algorithm(options, method, rates[0])
        share = algorithm.local_share
        settings = fed.Grid(rates, self.seeds, mus, lambda rate: build_schedule(options, share * rate))
        config = simulation_config(options, options.seed, algorithm)
        count = len(self.seeds) * len(mus or (0,)) * len(rates)
        title = f"{options.task} {method.name}: {count} settings of {options.rounds} rounds, {options.schedule} rate"
        if not console.is_terminal:
            console.print(f"{title}: compiling …", soft_wrap=True, highlight=False)
        bars = Bar(*figures, console=console, disable=not console.is_terminal, transient=True)
        with stop_on_interrupt(stop), bars as bar:
            row = bar.add_task(title, total=options.rounds)
            return fed.sweep(
                self.task,
                lambda rate: build_algorithm(options, method, rate, seeds=self.seeds),
                self.populations,
                config,
                settings,
                participation=self.participation,
                callback=tell,
            )


@dataclass(frozen=True)
class Trial:
    """A learning rate that was tried.

    Attributes:
      algorithm: the method's name.
      schedule: of the rate over the rounds.
      learning_rate: the rate.
      rounds_to_target: for every tuning seed; None where it was not reached or there is no target.
      final: the metric at the end, for every tuning seed; None where the run diverged.
      diverged: how many of the runs did.
    """

    algorithm: str
    schedule: str
    learning_rate: float
    rounds_to_target: list[float | None]
    final: list[float | None]
    diverged: int

    def score(self, metric: fed.Metric, *, by_target: bool) -> tuple[float, float]:
        """Smaller is better: mean rounds to the target, infinite if a seed missed it; then the mean final value."""
        reached = [rounds for rounds in self.rounds_to_target if rounds is not None]
        soon = by_target and len(reached) == len(self.rounds_to_target) > 0
        return float(np.mean(reached)) if soon else math.inf, -metric.sign * self.mean_final(metric)

    def mean_final(self, metric: fed.Metric) -> float:
        """The mean of the final values; the worst if a run diverged."""
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
    """What a method runs with.

    Attributes:
      learning_rate, schedule: the best that was tried.
      trials: all that were, none if the rate was given.
      at_edge: whether the best rate is the smallest or the largest that was tried with its schedule.
    """

    learning_rate: float
    schedule: str
    trials: tuple[Trial, ...] = ()
    at_edge: bool = False


class Search:
    """The tuning of a comparison: each method the same number of runs, kept run by run in ``tuning.json``."""

    def __init__(self, options: Compare, task: Any, directory: Path | None, console: Console) -> None:
        """Prepare the data.

        Raises:
          ValueError: see :class:`Held`.
        """
        first = options.seed + FIRST_TUNING_SEED
        # Tuned where nothing goes wrong, if the comparison is of what that costs.
        calm = options.in_calm() if options.protocol == "robustness" else options
        self.held = Held(calm, task, range(first, first + options.tuning_seeds))
        self.options, self.console, self.directory = calm, console, directory
        self.metric: fed.Metric | None = None
        self.trials: list[Trial] = []
        self.interrupted = False

    def begin(self, directory: Path) -> None:
        """Write to ``directory``, and take up what is there.

        Raises:
          ValueError: ``tuning.json`` is not as it was written.
        """
        self.directory = directory
        if not exists(directory / RESULTS, "resume"):
            return
        from pydantic import TypeAdapter

        try:
            content = TypeAdapter(Kept).validate_json(read_regular(directory / RESULTS))
            for trial in content.trials:
                positive("learning_rate", trial.learning_rate)
                if {len(trial.final), len(trial.rounds_to_target)} != {len(self.held.seeds)}:
                    raise ValueError(f"a trial has not {len(self.held.seeds)} runs")
        except (ValueError, RecursionError) as error:
            reason = first_line(error)
            raise ParameterError(
                "resume", f"must be a directory whose {RESULTS} is as it was written ({reason})"
            ) from error
        self.trials = content.trials
        self.metric = fed.Metric(content.metric, content.higher_is_better)

    def tune(self, method: Method, rounds: int, eval_every: int) -> Tuned | None:
        """Try rates with every schedule; None if it was interrupted."""
        assert self.directory is not None
        # Another process may have begun with this method, and have been ended.
        with writing(self.directory), exit_codes.refusing():
            self.begin(self.directory)
        whole = replace(self.options, rounds=rounds, eval_every=eval_every)
        for schedule in self.options.schedules:
            options = replace(whole, schedule=schedule)
            while wanted := self._wanted(options, method):
                if not self._try(options, method, wanted):
                    return None
        own = [trial for trial in self.trials if trial.algorithm == method.name]
        best = min(own, key=self._score)
        rates = [trial.learning_rate for trial in own if trial.schedule == best.schedule]
        at_edge = len(rates) > 1 and best.learning_rate in (min(rates), max(rates))
        return Tuned(best.learning_rate, best.schedule, tuple(own), at_edge)

    def _score(self, trial: Trial) -> tuple[float, float]:
        assert self.metric is not None
        by_target = self.options.protocol != "quality-under-budget" and self.held.target is not None
        return trial.score(self.metric, by_target=by_target)

    def _wanted(self, options: Compare, method: Method) -> list[float]:
        """The rates to try next with a schedule; none when it has had its share."""
        tried = {
            trial.learning_rate: self._score(trial)
            for trial in self.trials
            if (trial.algorithm, trial.schedule) == (method.name, options.schedule)
        }
        if options.rates:
            return [rate for rate in options.rates if rate not in tried]
        left = options.tries - len(tried)
        return fed.next_rates(tried, first_guess(options, method))[:left] if left > 0 else []

    def _try(self, options: Compare, method: Method, rates: Sequence[float]) -> bool:
        result = self.held.sweep(options, method, rates, self.console)
        if result.interrupted:
            self.interrupted = True
            return False
        new = []
        target = self.held.target
        final = result.final()[:, 0]
        first = np.full(final.shape, np.inf) if target is None else result.rounds_to(target)[:, 0]
        for place, rate in enumerate(rates):
            reached = [float(each) if np.isfinite(each) else None for each in first[:, place]]
            diverged = int((result.diverged_at[:, 0, place] >= 0).sum())
            ends = [float(each) if np.isfinite(each) else None for each in final[:, place]]
            new.append(Trial(method.name, options.schedule, rate, reached, ends, diverged))
        assert self.directory is not None
        with writing(self.directory), exit_codes.refusing():
            self.begin(self.directory)
            self.trials += new
            self.metric = result.metric
            write_json(self.directory / RESULTS, as_content(self.trials, self.metric, self.held.target))
        return True


def as_content(trials: Sequence[Trial], metric: fed.Metric, target: float | None) -> Mapping[str, Any]:
    """Trials as ``tuning.json`` holds them."""
    told = {"metric": metric.name, "higher_is_better": metric.higher_is_better, "target": target}
    return {**told, "trials": [asdict(trial) for trial in trials]}


def how_tuned(method: str, tuned: Tuned, metric: fed.Metric, target: float | None) -> str:
    """One sentence: what was best, of how many runs, and whether the rates tried were too few."""
    best = next(
        trial
        for trial in tuned.trials
        if (trial.learning_rate, trial.schedule) == (tuned.learning_rate, tuned.schedule)
    )
    words = metric.name.replace("_", " ")
    rounds, final = best.score(metric, by_target=True)[0], best.mean_final(metric)
    soon = f"{words} {target:g} after {rounds:.0f} rounds, " if target is not None and math.isfinite(rounds) else ""
    missed = f"; {target:g} not reached with every seed" if target is not None and not soon else ""
    edge = " (the edge of what was tried: more --tries may do better)" if tuned.at_edge else ""
    runs = len(tuned.trials) * len(best.final)
    return (
        f"{method}: of {runs} runs best at rate {tuned.learning_rate:g}, {tuned.schedule}{edge}: {soon}{words} "
        f"{final:.4f} at the end{missed}"
    )
