"""``hiso-jax sweep``: a grid of settings as one program."""

import json
from pathlib import Path

from rich.console import Console

from hiso_jax import fed
from hiso_jax.checks import ParameterError
from hiso_jax.cli import exit_codes
from hiso_jax.cli.interrupt import exit_code
from hiso_jax.cli.loading import load_task, notes
from hiso_jax.cli.restore import CONFIG, resumed_study
from hiso_jax.cli.study import Sweep
from hiso_jax.cli.tuning import Held
from hiso_jax.experiment import as_written, check_methods, choice_of, methods_of, rate_grid
from hiso_jax.fed.ledger import exists, read_regular
from hiso_jax.reports import (
    create_directory,
    rates_picture,
    sweep_as_dict,
    sweep_from_dict,
    sweep_table,
    verdict,
    write_json,
)

RESULTS = "sweep.json"


def _sweep_all(options: Sweep, held: Held, directory: Path, console: Console) -> dict[str, fed.SweepResult]:
    """Run the grid of every method, up to an interrupt; what is whole in ``directory`` is taken from there."""
    with exit_codes.refusing():
        kept = {name: result for name, result in _kept(directory).items() if not result.interrupted}
    results: dict[str, fed.SweepResult] = {}
    for method in methods_of(options.algorithms).values():
        found = kept.get(method.name)
        results[method.name] = found or held.sweep(
            options, method, (options.rates or rate_grid(options)), console, mus=options.mus
        )
        _write(results, held.target, directory)
        if results[method.name].interrupted:
            break
    return results


def sweep(options: Sweep, console: Console) -> int:
    """Run every method's grid, write the directory, print the table, and return the exit code.

    Raises:
      UsageError: the options name data or a directory that cannot be used; nothing has been written then.
    """
    with exit_codes.refusing():
        options = options if options.resume is None else resumed_study(options)
        task = load_task(options, console)
        held = Held(options, task, range(options.seed, options.seed + options.seeds))
        check_methods(options, task, methods_of(options.algorithms).values())
        directory = options.resume or create_directory(options.out, f"{choice_of('task', options).title}-sweep")
    config = {**as_written(options), "grid": (options.rates or rate_grid(options)), "target": held.target}
    write_json(directory / CONFIG, config)
    for note in notes(held.task, held.populations[0]):
        console.print(note, soft_wrap=True, highlight=False)
    results = _sweep_all(options, held, directory, console)
    _report(results, held.target, directory, console)
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
        raise ParameterError("resume", f"must be a directory whose {RESULTS} is as it was written") from error
    if not isinstance(content, dict):
        raise ParameterError("resume", f"must be a directory whose {RESULTS} is as it was written")
    return {name: sweep_from_dict(result) for name, result in content.items()}


def _report(results: dict[str, fed.SweepResult], target: float | None, directory: Path, console: Console) -> None:
    """Write ``sweep.json`` and ``sweep.png``, and print the table and what was best."""
    _write(results, target, directory)
    rates_picture(results, target, directory / "sweep.png")
    console.print(sweep_table(results, target))
    for name, result in results.items():
        console.print(verdict(name, result, target), soft_wrap=True, highlight=False)
