"""The cost of a budget of differential privacy: the accuracy of a private mean against ε.

    python benchmarks/privacy.py --out results/privacy_digits.json
    python benchmarks/privacy.py --task mnist --data-dir FOLDER --epsilons 1 4 8 0 --rounds 200 --batch-size 8 \
        --rates 0.001 0.003 0.01 0.03 --tuning-seeds 1 --seeds 2 --out mnist.json

For every method, federation and ε the rounds, the directions and the rate are tuned on held-out examples with seeds of
their own, all with the same grid; the table shows other seeds on the test split. Messages are clipped to S = 1. Almost
all of them are longer, so that S only scales the rate. δ is 1e-5, and cohorts are secret.
"""

import json
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hiso_jax import algorithms, fed, tasks
from hiso_jax.fed.privacy import Sampling, noise_for

CLIP_NORM = 1.0


@dataclass(frozen=True)
class Settings:
    """Options of the script.

    Attributes:
      task: digits or mnist.
      data_dir: folder of MNIST's four IDX files.
      methods: names as on the command line.
      epsilons: budgets; 0 stands for no noise, with the same clipping.
      batch_size: examples of a client's batch.
      federations: clients and cohort, as N:C; above the number of examples clients are virtual.
      rounds, perturbations, rates: the grid on which every method is tuned.
      tuning_seeds, seeds: numbers of seeds.
      out: JSON file of the results.
    """

    task: Literal["digits", "mnist"] = "digits"
    data_dir: Path | None = None
    methods: tuple[str, ...] = ("hiso", "decomfl")
    epsilons: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 0.0)
    batch_size: int = 32
    federations: tuple[str, ...] = ("100:10", "10000:100")
    rounds: tuple[int, ...] = (100, 400)
    perturbations: tuple[int, ...] = (1, 5)
    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    tuning_seeds: int = 2
    seeds: int = 5
    out: Path = Path("privacy.json")


@dataclass(frozen=True)
class Case:
    """One cell of the table.

    Attributes:
      method: its name.
      clients: N.
      cohort: C.
      epsilon: ε of the budget, 0 for no noise.
    """

    method: str
    clients: int
    cohort: int
    epsilon: float


@dataclass(frozen=True)
class Trial:
    """The settings with which a case is tried.

    Attributes:
      rounds: R.
      perturbations: P.
      batch_size: examples of a client's batch.
    """

    rounds: int
    perturbations: int
    batch_size: int


def populations(task: Any, clients: int, seeds: list[int]) -> list[Any]:
    labels = task.train["label"]
    if clients > len(labels):
        return [fed.virtual(labels, clients, alpha=0.5, seed=seed) for seed in seeds]
    return [fed.dirichlet(labels, clients, alpha=0.5, seed=seed) for seed in seeds]


def tried(task: Any, case: Case, trial: Trial, rates: tuple[float, ...], seeds: list[int]):
    """The final values, [seeds, rates], and the noise multiplier."""
    noise = noise_for(case.epsilon, Sampling(case.clients, case.cohort, trial.rounds)) if case.epsilon else 0.0
    method = algorithms.load(f"{case.method}+private_mean")
    given = {"clip_norm": CLIP_NORM, "noise_multiplier": noise}
    every = max(1, trial.rounds // 10)
    config = fed.SimulationConfig(cohort=case.cohort, eval_every=every, **asdict(trial))
    grid = fed.Grid(rates, seeds)
    found = fed.sweep(
        task, lambda rate: method.build(rate, given), populations(task, case.clients, seeds), config, grid
    )
    return found.final()[:, 0], noise


def cell(settings: Settings, task: Any, case: Case) -> dict[str, Any]:
    """The tuned setting of a case, and its values on the test split."""
    tuning = [1000 + seed for seed in range(settings.tuning_seeds)]
    held = fed.hold_out(task, min(2000, len(task.train["label"]) // 5))
    best: tuple[float, int, int, float] = (-1.0, 0, 0, 0.0)
    for rounds, perturbations in product(settings.rounds, settings.perturbations):
        trial = Trial(rounds, perturbations, settings.batch_size)
        values = tried(held, case, trial, settings.rates, tuning)[0].mean(0)
        place = int(values.argmax())
        best = max(best, (float(values[place]), rounds, perturbations, settings.rates[place]))
    _, rounds, perturbations, rate = best
    trial = Trial(rounds, perturbations, settings.batch_size)
    values, noise = tried(task, case, trial, (rate,), list(range(settings.seeds)))
    return {
        "values": values[:, 0].round(4).tolist(),
        "noise_multiplier": noise,
        "rounds": rounds,
        "perturbations": perturbations,
        "rate": rate,
        "at_edge": rate in (min(settings.rates), max(settings.rates)),
    }


def main(settings: Settings) -> None:
    """Run what is missing, and print the table."""
    task = tasks.digits() if settings.task == "digits" else tasks.mnist(settings.data_dir)
    known = json.loads(settings.out.read_text()) if settings.out.exists() else {}
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    table = Table(title=f"{settings.task}, δ 1e-5", box=SIMPLE_HEAD)
    for heading in ("method", "clients", "cohort", *(f"ε {e:g}" if e else "no noise" for e in settings.epsilons)):
        table.add_column(heading)
    for method, federation in product(settings.methods, settings.federations):
        clients, cohort = map(int, federation.split(":"))
        row = []
        for epsilon in settings.epsilons:
            key = f"{settings.task} | {method} | {clients} | {cohort} | {epsilon:g}"
            if key not in known:
                known[key] = cell(settings, task, Case(method, clients, cohort, epsilon))
                settings.out.write_text(json.dumps(known, indent=1))
                print(key, known[key], file=sys.stderr, flush=True)
            values = np.array(known[key]["values"])
            edge = "*" if known[key]["at_edge"] else ""
            row.append(f"{values.mean():.3f} ± {values.std(ddof=1) if len(values) > 1 else 0:.3f}{edge}")
        table.add_row(method, f"{clients:,}", str(cohort), *row)
    Console(width=160).print(table)
    print("± is a standard deviation over the seeds; * a rate at the edge of the grid")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
