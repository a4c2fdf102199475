"""``hiso-jax compare``: several methods from one start on one data set, in one table."""

import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from hiso_jax import fed
from hiso_jax.cli import exit_codes
from hiso_jax.cli.experiment import (
    AnyTask,
    Setting,
    build_population,
    build_simulation,
    build_task,
    check_methods,
    check_virtual,
    grid,
    is_virtual,
    notes,
    target_of,
    virtual_note,
)
from hiso_jax.cli.interrupt import exit_code, stop_on_interrupt
from hiso_jax.cli.methods import methods_of
from hiso_jax.cli.options import Compare
from hiso_jax.cli.progress import Display
from hiso_jax.cli.restore import as_written
from hiso_jax.cli.sweep import Tuning, report
from hiso_jax.reports import (
    Asked,
    append_evaluation,
    comparison_table,
    create_directory,
    curves,
    summarise,
    write_json,
)


def compare(options: Compare, console: Console) -> int:
    """Run every method with every seed, write the directory, print the table, and return the exit code.

    Methods with the same seed share their initial parameters, their partition, their cohorts and their batches.

    Raises:
      UsageError: the options name data or a directory that cannot be used; nothing has been written then.
    """
    with exit_codes.refusing():
        task = build_task(options)
        check_virtual(options, task)
        seeds = range(options.seed, options.seed + options.seeds)
        populations = {seed: build_population(options, task, seed) for seed in seeds}
        tuning = Tuning(options, task) if options.learning_rate is None else None
        options.participation()
        check_methods(options, task, methods_of(options.algorithms).values())
        directory = create_directory(options.out, f"{options.task}-compare")
    target = target_of(options, task)
    config = {**as_written(options), "learning_rates": grid(options), "target": target}
    write_json(directory / "config.json", config)
    for note in notes(options, task):
        console.print(note, soft_wrap=True, highlight=False)
    if tuning is not None and is_virtual(options, tuning.task) and not is_virtual(options, task):
        console.print(f"tuning with {virtual_note(options, tuning.task)}", soft_wrap=True, highlight=False)
    rates, interrupted = _rates(options, tuning, directory, console)
    write_json(directory / "config.json", {**config, "learning_rate": rates})
    runs = _Runs(options, task, directory, console)
    for seed in seeds:
        for name, rate in rates.items():
            interrupted = interrupted or runs.add(name, rate, seed, populations[seed])
    runs.report(config)
    console.print(f"written to {directory}", soft_wrap=True, highlight=False)
    if interrupted:
        console.print("interrupted: the table holds the finished runs", soft_wrap=True)
        return exit_code()
    return exit_codes.DONE


def _rates(options: Compare, tuning: Tuning | None, directory: Path, console: Console) -> tuple[dict[str, float], bool]:
    """The rate of every method, asked for or tuned, and whether tuning was interrupted."""
    if tuning is None:
        given = options.learning_rate or ()
        whole = given * len(options.algorithms) if len(given) == 1 else given
        return dict(zip(options.algorithms, whole, strict=True)), False
    results = tuning.sweep_all(None, console)
    report(results, tuning.target, directory, console)
    rates = {name: result.best(tuning.target).learning_rate for name, result in results.items()}
    return rates, any(result.interrupted for result in results.values())


class _Runs:
    """The finished runs of a comparison."""

    def __init__(self, options: Compare, task: AnyTask, directory: Path, console: Console) -> None:
        self.options, self.task, self.directory, self.console = options, task, directory, console
        self.target, self.methods = target_of(options, task), methods_of(options.algorithms)
        self.summaries: dict[str, list[dict[str, Any]]] = {name: [] for name in self.methods}
        self.histories: dict[str, list[list[fed.Evaluation]]] = {name: [] for name in self.methods}

    def add(self, name: str, rate: float, seed: int, population: Any) -> bool:
        """Run a method with a seed, and return whether it was interrupted."""
        begin = time.perf_counter()
        display = Display(self.console, f"{name} seed {seed}", self.task)
        keep = partial(append_evaluation, self.directory, algorithm=name, seed=seed)
        simulation = build_simulation(self.options, self.task, population, Setting(self.methods[name], rate, seed))
        simulation.callbacks = (display, keep)
        with display, stop_on_interrupt(simulation.stop):
            result = simulation.run()
        if not result.interrupted:
            metric = fed.metric_of(self.task, result.metrics[0].metrics)
            asked = Asked(self.options.task, name, rate, seed, metric, self.target)
            self.histories[name].append(result.metrics)
            self.summaries[name].append(summarise(asked, result, time.perf_counter() - begin))
        return result.interrupted

    def report(self, config: dict[str, Any]) -> None:
        """Write ``comparison.json`` and the picture, and print the table."""
        options = self.options
        write_json(self.directory / "comparison.json", {"config": config, "runs": self.summaries})
        finished = {name: runs for name, runs in self.histories.items() if runs}
        if finished:
            title = f"{options.task}: {options.clients} clients, {options.cohort} a round, {options.schedule} rate"
            metric = fed.metric_of(self.task, next(iter(finished.values()))[0][0].metrics)
            curves(finished, self.directory / "curves.png", title=title, metric=metric, target=self.target)
            self.console.print(comparison_table(self.summaries, metric, self.target))
