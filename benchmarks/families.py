"""Rounds to a target for every family of raw perturbations, each at its own best rate, on paired seeds.

    python benchmarks/families.py --task digits
    python benchmarks/families.py --task mnist --data-dir FOLDER_WITH_IDX_FILES

Rates are tuned on a validation split with a seed of their own, on a grid of factor √2 that grows until its best is
inside; then each family runs at its best with other seeds on the whole training set, evaluated on the test split.
Runs of one seed share initial parameters, partition, cohorts and batches. Intervals are Student's t intervals of the
paired log ratios to gaussian.
"""

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from scipy import stats

import hiso_jax
from hiso_jax import fed, tasks

FAMILIES = ("gaussian", "rademacher", "binomial", "low_rank", "low_rank_4")
METHODS = {"decomfl": (hiso_jax.decomfl, 0.04), "hiso": (hiso_jax.hiso, 0.015)}
STEP = math.sqrt(2)


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      task: digits, or mnist, a CNN.
      data_dir: folder with MNIST's IDX files.
      rounds: rounds of a run.
      clients, cohort, alpha: the number of clients, the cohort size and the Dirichlet concentration.
      families, methods: some of them, comma-separated.
      rate: one rate for all families, in place of tuning; 0 tunes.
      scale: factor on the guesses at rates.
      seeds: number of reported seeds.
      tuning_seeds: number of seeds for the grid.
      every: rounds between evaluations.
      out: JSON file to write.
    """

    task: Literal["digits", "mnist"] = "digits"
    data_dir: Path | None = None
    rounds: int = 1000
    clients: int = 100
    cohort: int = 10
    alpha: float = 0.5
    families: str = ",".join(FAMILIES)
    methods: str = "decomfl,hiso"
    rate: float = 0.0
    scale: float = 1.0
    seeds: int = 5
    tuning_seeds: int = 2
    every: int = 10
    out: Path | None = None


def sweep(arguments, task, make, rates, seeds):
    populations = [
        fed.dirichlet(task.train["label"], arguments.clients, alpha=arguments.alpha, seed=seed) for seed in seeds
    ]
    config = fed.SimulationConfig(
        rounds=arguments.rounds, cohort=arguments.cohort, eval_every=arguments.every, batch_size=32
    )
    return fed.sweep(task, make, populations, config, fed.Grid(learning_rates=rates, seeds=seeds))


def tuned(arguments, task, make, guess):
    """The best rate of a grid that grew until it was inside, and how many rates were tried."""
    held = task.hold_out(len(task.test["label"]) if arguments.task == "digits" else 5000, seed=1)
    tried = {}
    exponents = [-2, -1, 0, 1, 2]
    while True:
        new = [guess * STEP**e for e in exponents if e not in tried]
        result = sweep(arguments, held, make, new, tuple(range(1000, 1000 + arguments.tuning_seeds)))
        first, final = result.rounds_to(task.target).mean(0)[0], result.final().mean(0)[0]
        places = [e for e in exponents if e not in tried]
        tried |= {e: (-first[i], final[i]) for i, e in enumerate(places)}
        best = max(tried, key=lambda e: tried[e])
        if best == min(tried):
            exponents = [best - 2, best - 1]
        elif best == max(tried):
            exponents = [best + 1, best + 2]
        else:
            return guess * STEP**best, len(tried)


def main(arguments: Arguments) -> None:
    task = tasks.digits() if arguments.task == "digits" else tasks.mnist(arguments.data_dir)
    seeds, rows = tuple(range(arguments.seeds)), []
    for method in arguments.methods.split(","):
        reference, (make, guess) = None, METHODS[method]
        for family in arguments.families.split(","):
            own = partial(make, sampler=family)
            tune = not arguments.rate
            rate, count = tuned(arguments, task, own, guess * arguments.scale) if tune else (arguments.rate, 0)
            result = sweep(arguments, task, own, [rate], seeds)
            rounds = result.rounds_to(task.target)[:, 0, 0]
            reference = rounds if reference is None else reference
            row = {"method": method, "family": family, "rate": rate, "tried": count, "rounds": rounds.tolist()}
            row["final"] = result.final()[:, 0, 0].tolist()
            logs = np.log(rounds) - np.log(reference)
            row["ratio"] = float(np.exp(logs.mean()))
            if family != "gaussian" and np.isfinite(logs).all() and len(logs) > 1:
                half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
                row["interval"] = [float(np.exp(logs.mean() + side * half)) for side in (-1, 1)]
            rows.append(row)
            print(json.dumps(row), flush=True)
    out = arguments.out or Path(f"benchmarks/results/families_{arguments.task}.json")
    out.write_text(
        json.dumps({"settings": {**vars(arguments), "data_dir": None, "out": None}, "rows": rows}, indent=2) + "\n"
    )
    title = f"{arguments.task}, {arguments.clients} clients, {arguments.cohort} a round: rounds to {task.target:g}"
    table = Table(title=title)
    for heading in ("method", "family", "rate", "rounds", "of gaussian's", "95 %", "final"):
        table.add_column(heading)
    for r in rows:
        interval = "–".join(f"{x:.2f}" for x in r.get("interval", []))
        numbers = f"{r['rate']:.3g}", f"{np.mean(r['rounds']):.0f}", f"{r['ratio']:.2f}", interval
        table.add_row(r["method"], r["family"], *numbers, f"{np.mean(r['final']):.3f}")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__.split("\n")[0]))
