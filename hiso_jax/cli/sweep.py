"""``hiso-jax sweep``: a grid of settings as one program, and the tuning that ``compare`` does with it."""

import json
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from hiso_jax import fed
from hiso_jax.algorithms import Method
from hiso_jax.cli import exit_codes
from hiso_jax.cli.experiment import (
    AnyTask,
    build_algorithm,
    build_population,
    build_schedule,
    build_task,
    check_methods,
    check_virtual,
    examples_of,
    notes,
    simulation_config,
    target_of,
)
from hiso_jax.cli.interrupt import exit_code, stop_on_interrupt
from hiso_jax.cli.methods import methods_of
from hiso_jax.cli.options import Grid, Sweep
from hiso_jax.cli.rates import grid
from hiso_jax.cli.restore import CONFIG, as_written, resumed_grid
from hiso_jax.fed.ledger import exists, read_regular
from hiso_jax.fed.population import AnyPopulation
from hiso_jax.reports import (
    create_directory,
    rates_picture,
    sweep_as_dict,
    sweep_from_dict,
    sweep_table,
    verdict,
    write_json,
)

VALIDATION_SHARE = 0.2
RESULTS = "sweep.json"


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
        self.options, self.methods = options, methods_of(options.algorithms)
        self.task = fed.hold_out(task, held, seed=options.seed)
        self.target = target_of(options, task)
        self.seeds = list(range(options.seed, options.seed + options.seeds))
        self.populations: list[AnyPopulation] = [build_population(options, self.task, seed) for seed in self.seeds]
        self.participation = options.participation()

    def sweep_all(self, mus: tuple[float, ...] | None, directory: Path, console: Console) -> dict[str, fed.SweepResult]:
        """Run the grid of every method, up to an interrupt; what is whole in ``directory`` is taken from there."""
        with exit_codes.refusing():
            kept = {name: result for name, result in _kept(directory).items() if not result.interrupted}
        results: dict[str, fed.SweepResult] = {}
        for method in self.methods.values():
            results[method.name] = kept.get(method.name) or self.sweep(method, mus, console)
            _write(results, self.target, directory)
            if results[method.name].interrupted:
                break
        return results

    def sweep(self, method: Method, mus: tuple[float, ...] | None, console: Console) -> fed.SweepResult:
        """Run the grid of one method, showing how far it is."""
        options, stopped = self.options, False

        def stop() -> None:
            nonlocal stopped
            stopped = True

        def tell(done: int, rounds: int) -> bool:
            bar.update(row, completed=done, total=rounds)
            return stopped

        figures = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn())
        rates = grid(options)
        algorithm = build_algorithm(options, method, rates[0])
        share = algorithm.local_share
        settings = fed.Grid(rates, self.seeds, mus, lambda rate: build_schedule(options, share * rate))
        config = simulation_config(options, options.seed, algorithm)
        count = len(self.seeds) * len(mus or (0,)) * len(rates)
        title = f"{options.task} {method.name}: {count} settings"
        if not console.is_terminal:
            console.print(f"{title}: compiling …")
        with stop_on_interrupt(stop), Bar(*figures, console=console, disable=not console.is_terminal) as bar:
            row = bar.add_task(title, total=options.rounds)
            return fed.sweep(
                self.task,
                lambda rate: build_algorithm(options, method, rate),
                self.populations,
                config,
                settings,
                participation=self.participation,
                callback=tell,
            )


def sweep(options: Sweep, console: Console) -> int:
    """Run every method's grid, write the directory, print the table, and return the exit code.

    Raises:
      UsageError: the options name data or a directory that cannot be used; nothing has been written then.
    """
    with exit_codes.refusing():
        options = options if options.resume is None else resumed_grid(options)
        task = build_task(options, console)
        check_virtual(options, task)
        tuning = Tuning(options, task)
        check_methods(options, task, tuning.methods.values())
        directory = options.resume or create_directory(options.out, f"{options.task}-sweep")
    config = {**as_written(options), "grid": grid(options), "target": tuning.target}
    write_json(directory / CONFIG, config)
    for note in notes(options, tuning.task):
        console.print(note, soft_wrap=True, highlight=False)
    results = tuning.sweep_all(options.mus, directory, console)
    report(results, tuning.target, directory, console)
    console.print(f"written to {directory}", soft_wrap=True, highlight=False)
    if any(result.interrupted for result in results.values()):
        again = f"hiso-jax sweep --resume {directory}"
        console.print(f"interrupted: the settings are compared as far as they got; go on with: {again}", soft_wrap=True)
        return exit_code()
    return exit_codes.DONE


def _write(results: dict[str, fed.SweepResult], target: float | None, directory: Path) -> None:
    write_json(directory / RESULTS, {name: sweep_as_dict(result, target) for name, result in results.items()})


def _kept(directory: Path) -> dict[str, fed.SweepResult]:
    """What sweeps have left in a directory before.

    Raises:
      ValueError: it is not as it was written.
    """
    if not exists(directory / RESULTS, "resume"):
        return {}
    try:
        content = json.loads(read_regular(directory / RESULTS))
    except RecursionError as error:
        raise ValueError(f"resume must be a directory whose {RESULTS} is as it was written") from error
    if not isinstance(content, dict):
        raise ValueError(f"resume must be a directory whose {RESULTS} is as it was written")
    return {name: sweep_from_dict(result) for name, result in content.items()}


def report(results: dict[str, fed.SweepResult], target: float | None, directory: Path, console: Console) -> None:
    """Write ``sweep.json`` and ``sweep.png``, and print the table and what was best."""
    _write(results, target, directory)
    rates_picture(results, target, directory / "sweep.png")
    console.print(sweep_table(results, target))
    for name, result in results.items():
        console.print(verdict(name, result, target), soft_wrap=True, highlight=False)
