"""``hiso-jax sweep``: a grid of settings as one program, and the tuning that ``compare`` does with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from hiso_jax import fed
from hiso_jax.cli import exit_codes
from hiso_jax.cli.experiment import (
    AnyTask,
    build_optimizer,
    build_population,
    build_schedule,
    build_task,
    examples_of,
    grid,
    is_virtual,
    simulation_config,
    virtual_note,
)
from hiso_jax.cli.interrupt import stop_on_interrupt
from hiso_jax.cli.options import Grid, Sweep
from hiso_jax.cli.plots import rates_picture
from hiso_jax.cli.report import config_of, create_directory, write_json
from hiso_jax.fed.population import AnyPopulation

VALIDATION_SHARE = 0.2
NEVER = "—"


class Tuning:
    """A task without its test split: what a sweep may look at."""

    def __init__(self, options: Grid, task: AnyTask) -> None:
        """Hold the validation examples out and deal the rest to the clients.

        Raises:
          ValueError: too many or too few examples held out, or too few left for the clients.
        """
        total = examples_of(task)
        held = round(VALIDATION_SHARE * total) if options.validation is None else options.validation
        if not 1 <= held < total:
            raise ValueError(f"validation must be at least 1 and below {total}, the training examples; got {held}")
        self.options = options
        self.task = task.hold_out(held, seed=options.seed)
        self.target = task.target if options.target is None else options.target
        self.seeds = list(range(options.seed, options.seed + options.seeds))
        self.populations: list[AnyPopulation] = [build_population(options, self.task, seed) for seed in self.seeds]
        self.participation = options.participation()

    def sweep_all(self, mus: tuple[float, ...] | None, console: Console) -> dict[str, fed.SweepResult]:
        """Run the grid of every method, up to an interrupt."""
        results: dict[str, fed.SweepResult] = {}
        for algorithm in self.options.algorithms:
            results[algorithm] = self.sweep(algorithm, mus, console)
            if results[algorithm].interrupted:
                break
        return results

    def sweep(self, algorithm: str, mus: tuple[float, ...] | None, console: Console) -> fed.SweepResult:
        """Run the grid of one method, showing how far it is."""
        options, stopped = self.options, False

        def stop() -> None:
            nonlocal stopped
            stopped = True

        figures = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
        rates = grid(options)
        settings = len(self.seeds) * len(mus or (0,)) * len(rates)
        title = f"{options.task} {algorithm}: {settings} settings"
        if not console.is_terminal:
            console.print(f"{title}: compiling …")
        with stop_on_interrupt(stop), Bar(*figures, console=console, disable=not console.is_terminal) as bar:
            row = bar.add_task(title, total=options.rounds)
            return fed.sweep(
                self.task,
                lambda rate: build_optimizer(options, algorithm, build_schedule(options, rate)),
                self.populations,
                simulation_config(options, options.seed),
                learning_rates=rates,
                seeds=self.seeds,
                mus=mus,
                local_learning_rate=lambda rate: build_schedule(options, rate),
                participation=self.participation,
                callback=lambda done, rounds: bar.update(row, completed=done, total=rounds),
                should_stop=lambda: stopped,
            )


def sweep(options: Sweep, console: Console) -> int:
    """Run every method's grid, write the directory, print the table, and return the exit code.

    Raises:
      UsageError: the options name data or a directory that cannot be used; nothing has been written then.
    """
    with exit_codes.refusing():
        task = build_task(options)
        tuning = Tuning(options, task)
        directory = create_directory(options, f"{options.task}-sweep")
    write_json(
        directory / "config.json",
        {**config_of(options), "learning_rates": grid(options), "target": tuning.target},
    )
    if is_virtual(options, tuning.task):
        console.print(virtual_note(options, tuning.task), soft_wrap=True, highlight=False)
    results = tuning.sweep_all(options.mus, console)
    report(results, tuning.target, directory, console)
    console.print(f"written to {directory}", soft_wrap=True, highlight=False)
    if any(result.interrupted for result in results.values()):
        console.print("interrupted: the settings are compared as far as they got", soft_wrap=True)
        return exit_codes.INTERRUPTED
    return exit_codes.DONE


def report(results: dict[str, fed.SweepResult], target: float | None, directory: Path, console: Console) -> None:
    """Write ``sweep.json`` and ``sweep.png``, and print the table and what was best."""
    write_json(directory / "sweep.json", {name: as_dict(result, target) for name, result in results.items()})
    rates_picture(results, target, directory / "sweep.png")
    console.print(table(results, target))
    for name, result in results.items():
        console.print(verdict(name, result, target), soft_wrap=True, highlight=False)


def verdict(name: str, result: fed.SweepResult, target: float | None) -> str:
    """One sentence: the best setting, why, and whether the grid may be too narrow."""
    best = result.best(target)
    setting = f"{name}: best at rate {best.learning_rate:g}"
    if len(result.mus) > 1:
        setting += f", mu {best.mu:g}"
    if best.rounds_to_target is not None:
        reason = f"accuracy {target:g} after {best.rounds_to_target:.0f} rounds, {best.final:.4f} at the end"
    elif target is not None:
        reason = f"accuracy {best.final:.4f} at the end; no setting reached {target:g} with every seed"
    else:
        reason = f"accuracy {best.final:.4f} at the end"
    edge = " (the edge of the grid: a wider one may do better)" if best.at_edge else ""
    return f"{setting}{edge}, {reason}"


def as_dict(result: fed.SweepResult, target: float | None) -> dict[str, Any]:
    """A sweep as JSON: its grid, its best setting, and every run's evaluations."""
    best = result.best(target)
    return {
        "seeds": list(result.seeds),
        "mus": list(result.mus),
        "learning_rates": list(result.learning_rates),
        "target": target,
        "best": vars(best),
        "rounds": result.rounds.tolist(),
        "final_accuracy": result.final().tolist(),
        "rounds_to_target": None if target is None else result.rounds_to(target).tolist(),
        "diverged_at_round": result.diverged_at.tolist(),
        "accuracy": result.metrics["accuracy"].tolist(),
        "loss": result.metrics["loss"].tolist(),
        "compile_seconds": result.compile_seconds,
        "run_seconds": result.run_seconds,
    }


def table(results: dict[str, fed.SweepResult], target: float | None) -> Table:
    """One row a setting: final validation accuracy and rounds to the target, means over the seeds."""
    title = "validation accuracy" if target is None else f"validation accuracy, and rounds to {target:g}"
    view = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    view.add_column("method", no_wrap=True)
    several_mus = any(len(result.mus) > 1 for result in results.values())
    for heading in ("rate", *(["mu"] if several_mus else []), "accuracy", "rounds", "diverged", ""):
        view.add_column(heading, justify="right", no_wrap=True)
    for name, result in results.items():
        best, final = result.best(target), result.final()
        first = np.full(final.shape, np.inf) if target is None else result.rounds_to(target)
        for m, mu in enumerate(result.mus):
            for column, rate in enumerate(result.learning_rates):
                runs = (slice(None), m, column)
                diverged = int((result.diverged_at[runs] >= 0).sum())
                view.add_row(
                    name,
                    f"{rate:g}",
                    *([f"{mu:g}"] if several_mus else []),
                    spread(final[runs], lambda value: f"{value:.4f}"),
                    spread(first[runs], lambda value: f"{value:.0f}") if np.isfinite(first[runs]).all() else NEVER,
                    f"{diverged} of {len(result.seeds)}" if diverged else "",
                    "best" if (rate, mu) == (best.learning_rate, best.mu) else "",
                )
        view.add_section()
    return view


def spread(values: np.ndarray, show: Callable[[float], str]) -> str:
    """A mean, and the standard deviation over seeds if there are several."""
    mean = show(float(np.mean(values)))
    return f"{mean} ± {show(float(np.std(values, ddof=1)))}" if len(values) > 1 else mean
