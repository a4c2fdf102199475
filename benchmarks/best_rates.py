"""HiSo and DeComFL on MNIST or digits, each at its own best constant rate and best cosine schedule from one grid.

    python benchmarks/best_rates.py --data-dir FOLDER_WITH_IDX_FILES

Every rate of the grid is tried with every method and schedule on a validation split held out of the training set;
then each (method, schedule) runs once at its best rate on the whole training set and is measured on the test split.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table

import hiso_jax
from hiso_jax import fed, tasks
from hiso_jax.reports import Compared, Subject, save_picture

METHODS: dict[str, Callable] = {"hiso": hiso_jax.hiso, "decomfl": hiso_jax.decomfl}
SCHEDULES = {"constant": lambda rate, rounds: rate, "cosine": optax.cosine_decay_schedule}


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      task: mnist or digits.
      data_dir: folder with MNIST's IDX files.
      rates: the grid, comma-separated.
      rounds: rounds per run.
      clients: clients in the population.
      cohort: clients per round.
      alpha: concentration of the Dirichlet partition.
      validation: training examples held out for tuning.
      seed: seed of everything random.
      out: folder for the JSON and the picture.
    """

    task: Literal["mnist", "digits"] = "mnist"
    data_dir: Path | None = None
    rates: str = "0.0005,0.001,0.002,0.004,0.008"
    rounds: int = 1000
    clients: int = 64
    cohort: int = 8
    alpha: float = 1.0
    validation: int = 5000
    seed: int = 0
    out: Path = Path("benchmarks/results")


def run(arguments: Arguments, task: tasks.Classification, method: str, schedule: str, rate: float) -> fed.Result:
    population = fed.dirichlet(task.train["label"], arguments.clients, alpha=arguments.alpha, seed=arguments.seed)
    config = fed.SimulationConfig(rounds=arguments.rounds, cohort=arguments.cohort, seed=arguments.seed, eval_every=25)
    tx = METHODS[method](SCHEDULES[schedule](rate, arguments.rounds))
    return fed.Simulation(task, tx, population, config).run()


def score(result: fed.Result) -> float:
    """Final accuracy, as the mean of the last three evaluations; zero for a run that diverged."""
    if result.diverged_at is not None:
        return 0.0
    return float(np.mean([row.metrics["accuracy"] for row in result.metrics[-3:]]))


def main(arguments: Arguments) -> None:
    console = Console()
    task = tasks.mnist(arguments.data_dir) if arguments.task == "mnist" else tasks.digits()
    tuning = task.hold_out(arguments.validation, seed=arguments.seed)
    grid = [float(rate) for rate in arguments.rates.split(",")]
    rows: list[dict[str, Any]] = []
    histories: dict[str, Any] = {}
    for method in METHODS:
        for schedule in SCHEDULES:
            validation = {}
            for rate in grid:
                result = run(arguments, tuning, method, schedule, rate)
                validation[rate] = score(result)
                ending = "" if result.diverged_at is None else f" (diverged at round {result.diverged_at})"
                console.print(f"{method} {schedule} {rate:g}: validation accuracy {validation[rate]:.4f}{ending}")
            best = max(grid, key=lambda rate: validation[rate])
            result = run(arguments, task, method, schedule, best)
            accuracies = [row.metrics["accuracy"] for row in result.metrics]
            target = fed.first_at_target(accuracies, task.target)
            rows.append(
                {
                    "method": method,
                    "schedule": schedule,
                    "rate": best,
                    "validation": {f"{rate:g}": value for rate, value in validation.items()},
                    "test_accuracy": accuracies[-1],
                    "test_loss": result.metrics[-1].metrics["loss"],
                    "rounds_to_target": None if target is None else result.metrics[target].round,
                    "rounds_per_second": result.rounds / result.run_seconds,
                    "curve": [[row.round, row.metrics["loss"], row.metrics["accuracy"]] for row in result.metrics],
                }
            )
            histories[f"{method}, {schedule} {best:g}"] = [result.metrics]
    view = Table(title=f"{arguments.task}, {arguments.rounds} rounds, test split", title_justify="left")
    for column in ("method", "schedule", "best rate", "accuracy", f"rounds to {task.target:g}"):
        view.add_column(column)
    for row in rows:
        figures = (f"{row['rate']:g}", f"{row['test_accuracy']:.4f}", str(row["rounds_to_target"] or "—"))
        view.add_row(row["method"], row["schedule"], *figures)
    console.print(view)
    setting = {name: str(value) for name, value in vars(arguments).items() if name not in ("out", "data_dir")}
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"best_rates_{arguments.task}"
    path.with_suffix(".json").write_text(json.dumps({"setting": setting, "rows": rows}, indent=2) + "\n")
    title = f"{arguments.task}: {arguments.clients} clients, {arguments.cohort} a round, each at its best rate"
    metric = fed.metric_of(task, next(iter(histories.values()))[0][0].metrics)
    compared = {name: Compared({}, [{"seed": 0}], runs) for name, runs in histories.items()}
    save_picture(Subject(title, compared, metric, task.target, None), path.with_suffix(".png"), title)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
