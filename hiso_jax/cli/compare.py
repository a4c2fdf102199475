"""``hiso-jax compare``: several methods from one start on one data set, in one table."""

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
    is_virtual,
    notes,
    target_of,
    virtual_note,
)
from hiso_jax.cli.interrupt import exit_code, stop_on_interrupt
from hiso_jax.cli.methods import methods_of
from hiso_jax.cli.options import Compare
from hiso_jax.cli.progress import Display
from hiso_jax.cli.rates import grid
from hiso_jax.cli.restore import CONFIG, as_written, resumed_grid
from hiso_jax.cli.sweep import Tuning, report
from hiso_jax.fed.ledger import write_whole
from hiso_jax.reports import (
    comparison_table,
    create_directory,
    curves,
    evaluation_line,
    write_json,
)


def compare(options: Compare, console: Console) -> int:
    """Run every method with every seed, write the directory, print the table, and return the exit code.

    Methods with the same seed share their initial parameters, their partition, their cohorts and their batches. Every
    run is kept in a directory of its own, so that a comparison that was ended goes on where it was.

    Raises:
      UsageError: the options name data or a directory that cannot be used; nothing has been written then.
    """
    with exit_codes.refusing():
        options = options if options.resume is None else resumed_grid(options)
        task = build_task(options, console)
        check_virtual(options, task)
        seeds = range(options.seed, options.seed + options.seeds)
        populations = {seed: build_population(options, task, seed) for seed in seeds}
        tuning = Tuning(options, task) if options.own_rates is None else None
        options.participation()
        check_methods(options, task, methods_of(options.algorithms).values())
        directory = options.resume or create_directory(options.out, f"{options.task}-compare")
    target = target_of(options, task)
    config = {**as_written(options), "grid": None if tuning is None else grid(options), "target": target}
    write_json(directory / CONFIG, config)
    for note in notes(options, task):
        console.print(note, soft_wrap=True, highlight=False)
    if tuning is not None and is_virtual(options, tuning.task) and not is_virtual(options, task):
        console.print(f"tuning with {virtual_note(options, tuning.task)}", soft_wrap=True, highlight=False)
    rates, interrupted = _rates(options, tuning, directory, console)
    runs = _Runs(options, task, directory, console)
    for seed in seeds:
        for name, rate in rates.items():
            interrupted = interrupted or runs.add(name, rate, seed, populations[seed])
    runs.report({**config, "rates": rates})
    console.print(f"written to {directory}", soft_wrap=True, highlight=False)
    if interrupted:
        again = f"hiso-jax compare --resume {directory}"
        console.print(f"interrupted: the table holds the finished runs; go on with: {again}", soft_wrap=True)
        return exit_code()
    return exit_codes.DONE


def _rates(options: Compare, tuning: Tuning | None, directory: Path, console: Console) -> tuple[dict[str, float], bool]:
    """The rate of every method, asked for or tuned, and whether tuning was interrupted."""
    if tuning is None:
        assert options.own_rates is not None
        return options.own_rates, False
    results = tuning.sweep_all(None, directory, console)
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
        """Run a method with a seed, or go on with it, and return whether it was interrupted."""
        method, options = self.methods[name], self.options
        display = Display(self.console, f"{name} seed {seed}", self.task, f"rate {rate:g}")
        folder = self.directory / "runs" / f"{list(self.methods).index(name)}-{method.title}-seed-{seed}"
        own = {"algorithm": name, "learning_rate": rate, "seed": seed, "target": self.target}
        with exit_codes.refusing():
            resume = folder.exists()
            folder.parent.mkdir(exist_ok=True)
            storage = fed.Storage(folder, {**as_written(options), **own}, resume=resume)
            setting = Setting(method, rate, seed)
            simulation = build_simulation(options, self.task, population, setting, storage=storage)
            simulation.callbacks = (display,)
            with display, stop_on_interrupt(simulation.stop):
                result = simulation.run()
        if not result.interrupted:
            self.histories[name].append(result.metrics)
            self.summaries[name].append(simulation.summary)
        return result.interrupted

    def report(self, config: dict[str, Any]) -> None:
        """Write ``comparison.json``, ``metrics.jsonl`` and the picture, and print the table."""
        options = self.options
        lines = [
            evaluation_line(row, algorithm=name, seed=run["seed"])
            for name, runs in self.histories.items()
            for history, run in zip(runs, self.summaries[name], strict=True)
            for row in history
        ]
        write_whole(self.directory / "metrics.jsonl", "".join(lines).encode())
        write_json(self.directory / "comparison.json", {"config": config, "runs": self.summaries})
        finished = {name: runs for name, runs in self.histories.items() if runs}
        if finished:
            title = f"{options.task}: {options.clients} clients, {options.cohort} a round, {options.schedule} rate"
            metric = fed.metric_of(self.task, next(iter(finished.values()))[0][0].metrics)
            curves(finished, self.directory / "curves.png", title=title, metric=metric, target=self.target)
            self.console.print(comparison_table(self.summaries, metric, self.target))
