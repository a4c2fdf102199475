"""Sweeps: grids of learning rates × seeds (× μ), one program per method; and a search for one rate."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hiso_jax import fed
from hiso_jax.checks import ParameterError
from hiso_jax.experiment import (
    DECIDING,
    Experiment,
    Single,
    as_written,
    build_task,
    check_methods,
    methods_of,
    notes,
    rate_grid,
    resolve,
    with_training_gb,
)
from hiso_jax.fed.ledger import exists, read_regular
from hiso_jax.reports import (
    rates_picture,
    sweep_as_dict,
    sweep_from_dict,
    write_json,
)
from hiso_jax.tune.directory import CONFIG, asked, directory_for
from hiso_jax.tune.results import Swept
from hiso_jax.tune.search import Held
from hiso_jax.tune.settings import Sweep
from hiso_jax.tune.watcher import Watcher

RESULTS = "sweep.json"


def run_sweep(settings: Sweep, task: Any, directory: Callable[[], Path], watcher: Watcher | None = None) -> Swept:
    """Run every method's grid and write the directory; complete results in the directory are reused.

    Args:
      settings: the settings of the sweep.
      task: the task that the settings name.
      directory: creates or finds the directory; called after all checks of the settings.
      watcher: is notified of the progress.

    Raises:
      ValueError: the data or the settings cannot be used, and nothing was written; or a file of the directory was
        altered.
    """
    watcher, settings = watcher or Watcher(), with_training_gb(settings, task)
    held = Held(settings, task, range(settings.seed, settings.seed + settings.seeds))
    methods = methods_of(settings.algorithms)
    check_methods(settings, task, methods.values())
    rates, folder = settings.rates or rate_grid(settings), directory()
    kept = {name: result for name, result in _kept(folder).items() if not result.interrupted}
    write_json(folder / CONFIG, {**as_written(settings), "grid": rates, "target": held.target})
    for note in notes(held.task, held.populations[0]):
        watcher.say(note)
    results: dict[str, fed.SweepResult] = {}
    for name, method in methods.items():
        results[name] = kept.get(name) or held.sweep(settings, method, rates, watcher, settings.mus)
        _write(results, held.target, folder)
        if results[name].interrupted:
            break
    rates_picture(results, held.target, folder / "sweep.png")
    return Swept(results, held.target, folder)


def _write(results: dict[str, fed.SweepResult], target: float | None, directory: Path) -> None:
    write_json(directory / RESULTS, {name: sweep_as_dict(result, target) for name, result in results.items()})


def _kept(directory: Path) -> dict[str, fed.SweepResult]:
    """The results of earlier sweeps in a directory.

    Raises:
      ParameterError: their file was altered.
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


def sweep(
    algorithms: Sequence[str] = Sweep.algorithms,
    *,
    out: Path | str | None = None,
    watcher: Watcher | None = None,
    **options: Any,
) -> Swept:
    """Try a grid of learning rates × seeds (× mu) with every method, as one program each, on a validation split.

    This is ``hiso-jax sweep``, whose options are keywords.

    Args:
      algorithms: names of methods.
      out: directory to write; a sweep with the same options in it is continued. None is a temporary directory, which
        is removed.
      watcher: is notified of the progress; ``tune.Progress()`` shows it.
      options: the options of the sweep: ``learning_rate`` (a list of rates), ``seeds``, ``task``, ``rounds`` and all
        others.

    Raises:
      ParameterError: an option is unknown, out of range or without effect.

    Example:
      >>> from hiso_jax import tune
      >>> numbers = dict(rounds=10, clients=10, cohort=2, perturbations=1, batch_size=4, eval_every=5)
      >>> swept = tune.sweep(["decomfl"], learning_rate=[0.01, 0.03], **numbers)
      >>> [row["learning_rate"] for row in swept.rows()]
      [0.01, 0.03]
    """
    settings = asked(Sweep, "sweep", algorithms, options)
    task = build_task(settings)
    with directory_for(settings, out) as directory:
        return run_sweep(settings, task, directory, watcher)


def find_rate(**options: Any) -> fed.RateProbe:
    """Search for a learning rate as ``--learning-rate auto`` does: some rounds at a few rates, from the same start.

    Args:
      options: the options of an experiment, without ``learning_rate``, and with its choices by name. For a task or a
        population that is a value, see :meth:`hiso_jax.Experiment.find_rate`.

    Raises:
      ParameterError: an option is unknown, out of range or without effect; or the loss is finite at no rate.

    Example:
      >>> from hiso_jax import tune
      >>> found = tune.find_rate(algorithm="decomfl", rounds=100, clients=10, cohort=2, perturbations=1, probe_rounds=4)
      >>> found.learning_rate in found.learning_rates or found.learning_rate < found.fastest
      True
    """
    if "learning_rate" in options:
        raise ParameterError("learning_rate", "must not be given: it is looked for")
    names = {name: value for name, value in options.items() if name in DECIDING}
    return Experiment.of(resolve(Single, names).settings({**options, "learning_rate": "auto"}, "find_rate")).find_rate()
