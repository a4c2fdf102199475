"""Training on accuracy itself beside training on the loss: where each ends, and how many scalars are zero.

    python benchmarks/objectives.py                                    # the digits, ten minutes
    python benchmarks/objectives.py --model SmolLM2-135M-Instruct.Q4_1.gguf    # four topics, 40 minutes

Digits: 100 clients, Dirichlet 0.5, 10 a round, batch 32. Every pair of objective and μ has its learning rate from one
grid, tuned on two seeds of their own by the accuracy after the last round; five other seeds are paired. A language
model: DeComFL on LoRA adapters, 4 clients, 2 a round, batch 8, the texts of examples/topics, one seed.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import hiso_jax
from hiso_jax import fed, tasks

METHODS: dict[str, Any] = {"mosaic": hiso_jax.mosaic, "decomfl": hiso_jax.decomfl}
ROUNDS = {"mosaic": 200, "decomfl": 1000}
GRIDS = {
    ("mosaic", "loss"): (0.2, 0.4, 0.8, 1.6),
    ("mosaic", "accuracy"): (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4),
    ("decomfl", "loss"): (0.01, 0.02, 0.04, 0.08),
    ("decomfl", "accuracy"): (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56),
}
MUS = {"loss": (1e-3,), "accuracy": (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)}
TOPICS = (" weather", " sport", " food", " music")


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      methods: comma-separated, on the digits.
      tuning_seeds, seeds: how many.
      model: a language model, for its part alone.
      rounds: rounds of the language model.
      out: JSON file to write; its two parts are kept beside each other.
    """

    methods: str = "mosaic,decomfl"
    tuning_seeds: int = 2
    seeds: int = 5
    model: str = ""
    rounds: int = 24
    out: Path = Path("benchmarks/results/objectives.json")


def run(method: str, objective: str, mu: float, rate: float, seed: int) -> dict[str, float]:
    task = tasks.digits()
    task = task if objective == "loss" else fed.maximise(task, objective)
    population = fed.dirichlet(task.train["label"], 100, alpha=0.5, seed=seed)
    config = fed.SimulationConfig(rounds=ROUNDS[method], mu=mu, seed=seed, eval_every=ROUNDS[method] // 4)
    result = fed.Simulation(task, METHODS[method](rate), population, config).run()
    last = result.metrics[-1].metrics
    accuracy = last["accuracy"] if result.diverged_at is None else 0.0
    return {"accuracy": accuracy, "loss": last["loss"], "zeros": result.zeros or 0.0}


def digits(arguments: Arguments) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    begin = time.perf_counter()
    for method in arguments.methods.split(","):
        for objective, mus in MUS.items():
            for mu in mus:
                grid = GRIDS[method, objective]
                tuning = range(1000, 1000 + arguments.tuning_seeds)
                tried = {rate: mean(run(method, objective, mu, rate, s)["accuracy"] for s in tuning) for rate in grid}
                rate = max(tried, key=lambda rate: tried[rate])
                found = [run(method, objective, mu, rate, seed) for seed in range(arguments.seeds)]
                row = {"method": method, "objective": objective, "mu": mu, "rate": rate, "tried": tried, "runs": found}
                rows.append({**row, "at_end": rate in (grid[0], grid[-1])})
                accuracies = [round(each["accuracy"], 3) for each in found]
                print(
                    f"{time.perf_counter() - begin:.0f} s: {method} {objective} {mu:g} {rate:g} {accuracies}",
                    flush=True,
                )
    return rows


def language_model(arguments: Arguments) -> list[dict[str, Any]]:
    rows = []
    shared: dict[str, Any] = {
        "task": "text-classification", "model": arguments.model, "data_dir": Path("examples/topics"),
        "template": "{text} This is about", "verbalizer": list(TOPICS), "algorithm": "decomfl", "perturbations": 8,
        "clients": 4, "cohort": 2, "batch_size": 8, "rounds": arguments.rounds,
        "eval_every": max(1, arguments.rounds // 4),
    }  # fmt: skip
    settings = [("loss", 1e-3, rate) for rate in (0.001, 0.003, 0.01)]
    settings += [("accuracy", mu, rate) for mu in (1e-2, 3e-2) for rate in (0.01, 0.03, 0.1)]
    for objective, mu, rate in settings:
        begin = time.perf_counter()
        result = hiso_jax.Experiment(objective=objective, mu=mu, learning_rate=rate, **shared).run()
        row = {
            "objective": objective,
            "mu": mu,
            "rate": rate,
            "accuracy": [each.metrics["accuracy"] for each in result.metrics],
            "loss": [each.metrics.get("loss", math.nan) for each in result.metrics],
            "zeros": result.zeros,
            "diverged_at": result.diverged_at,
            "seconds": time.perf_counter() - begin,
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def main(arguments: Arguments) -> None:
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    if arguments.model:
        known["language model"] = language_model(arguments)
    else:
        known["digits"] = digits(arguments)
        table = Table(title="Accuracy on the digits after the last round, five seeds")
        for column in ("method", "objective", "mu", "rate", "median", "least to most", "zero scalars"):
            table.add_column(column, justify="right")
        for row in known["digits"]:
            accuracies = [each["accuracy"] for each in row["runs"]]
            table.add_row(
                row["method"],
                row["objective"],
                f"{row['mu']:g}",
                f"{row['rate']:g}" + (" (end)" if row["at_end"] else ""),
                f"{median(accuracies):.3f}",
                f"{min(accuracies):.3f} to {max(accuracies):.3f}",
                f"{np.median([each['zeros'] for each in row['runs']]):.1%}",
            )
        Console().print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
