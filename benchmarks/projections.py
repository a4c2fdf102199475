"""Rounds, bytes and forward passes to a target: finite differences, projections of progress, and vectors.

    python benchmarks/projections.py --task digits
    python benchmarks/projections.py --task mnist --data-dir FOLDER_WITH_IDX_FILES --target 0.7 --seeds 3

Every entry has its own rate of the server and, if clients take several steps, of the clients. Both are tuned on
held-out training examples with separate seeds, on grids that grow until the best pair is inside. Then every seed is run
once on the test split. Cohorts, batches and initial parameters are paired. A gradient counts as three forward passes.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optax
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy import stats

from hiso_jax import algorithms, fed, tasks
from hiso_jax.algorithms._local import gradients, local_sgd

# Ratios of neighbouring rates of the server. A search begins with 5 × 3 pairs, or with 15 rates without local steps.
STEP, FINE = 1.5, 1.2

# Phones and workstations: the command line's defaults, with a direction in a hundredth of the time of a forward pass.
FLEET = fed.Fleet(fed.LogNormal(0.1, 0.5), fed.LogNormal(2.5e6, 0.5), fed.LogNormal(6.25e5, 0.5), 1e-3)


def _average(server: Any, local: float) -> fed.Algorithm:
    """FedAvg with a rate of the server; without a local rate a message is the gradient."""
    return fed.Algorithm(optax.sgd(server), measure=fed.Local(local_sgd(local or 1.0), gradients))


def _projected(bits: int, sampler: Any = "gaussian") -> Callable[[Any, float], fed.Algorithm]:
    def make(server: Any, local: float) -> fed.Algorithm:
        return replace(algorithms.mosaic(server, scalar_bits=bits, sampler=sampler), measure=fed.projections())

    return make


@dataclass(frozen=True)
class Entry:
    """A way of measuring and sending.

    Attributes:
      make: (server's rate, clients' rate) → the algorithm.
      perturbations: P.
      server: the first guess of the server's rate.
      local: the first guess of the clients' rate; None for one local step.
      steps: K.
      rounds: most rounds to run.
      every: rounds between evaluations.
      share: share of the clients that can backpropagate; None is all.
    """

    make: Callable[[Any, float], fed.Algorithm]
    perturbations: int
    server: float
    local: float | None = None
    steps: int = 1
    rounds: int = 90
    every: int = 1
    share: float | None = None


ENTRIES = {
    "decomfl": Entry(lambda rate, _: fed.Algorithm(algorithms.decomfl(rate).tx), 5, 0.09, rounds=900, every=5),
    "mosaic, 64 × 2 bits": Entry(lambda rate, _: algorithms.mosaic(rate), 64, 0.8, rounds=160, every=2),
    "mosaic hadamard, 64 × 2 bits": Entry(
        lambda rate, _: algorithms.mosaic(rate, sampler="hadamard"), 64, 0.8, rounds=160, every=2
    ),
    "gradient, 64 × 2 bits": Entry(_projected(2), 64, 1.0, rounds=160, every=2),
    "gradient, 128 × 1 bit": Entry(_projected(1), 128, 1.0, rounds=120),
    "progress K = 5, 128 × 1 bit": Entry(_projected(1), 128, 4.0, 0.3, 5),
    "hadamard K = 5, 128 × 1 bit": Entry(_projected(1, "hadamard"), 128, 4.0, 0.3, 5),
    **{
        f"mixed {share:.0%}, K = 5, 128 × 1 bit": Entry(
            _projected(1, "hadamard"), 128, 3.0, 0.6, 5, rounds=120 if share < 0.5 else 90, share=share
        )
        for share in (0.75, 0.5, 0.25, 0.0)
    },
    "progress K = 5, 512 × 1 bit": Entry(_projected(1), 512, 4.0, 0.3, 5),
    "FedSGD": Entry(_average, 1, 1.0, rounds=120),
    "FedAvg K = 5": Entry(_average, 1, 1.0, 0.3, 5),
}


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      task: digits, mnist or fashion-mnist.
      data_dir: folder of IDX files.
      entries: some of the entries, the beginnings of their names, separated by semicolons; all by default.
      clients, cohort, alpha: the population and its cohorts.
      seeds: number of reported seeds.
      tuning_seeds: number of seeds for tuning, apart from the others.
      target: test accuracy.
      scale: factor on all first guesses.
      batch_size: examples of a client and local step.
      rounds: rounds of entries with local steps; by default their own.
      out: JSON file of the results.
    """

    task: str = "digits"
    data_dir: Path | None = None
    entries: str = ""
    clients: int = 100
    cohort: int = 10
    alpha: float = 0.5
    seeds: int = 10
    tuning_seeds: int = 3
    target: float = 0.9
    scale: float = 1.0
    batch_size: int = 32
    rounds: int | None = None
    out: Path | None = None


class Bench:
    """Sweeps of one task."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        folder = arguments.data_dir
        if arguments.task == "digits":
            self.task: Any = tasks.digits()
        else:
            assert folder is not None, "--data-dir must name the folder of the IDX files"
            self.task = {"mnist": tasks.mnist, "fashion-mnist": tasks.fashion_mnist}[arguments.task](folder)
        self.held = self.task.hold_out(len(self.task.test["label"]) if arguments.task == "digits" else 2000, seed=1)

    def sweep(
        self, entry: Entry, task: Any, servers: list[float], local: float | None, seeds: range
    ) -> fed.SweepResult:
        """Every rate of the server with every seed, as one program."""
        own = self.arguments
        populations = [fed.dirichlet(task.train["label"], own.clients, alpha=own.alpha, seed=seed) for seed in seeds]
        config = fed.SimulationConfig(
            rounds=(entry.local and own.rounds) or entry.rounds,
            cohort=own.cohort,
            local_steps=entry.steps,
            perturbations=entry.perturbations,
            eval_every=entry.every,
            batch_size=own.batch_size,
            backprop_share=entry.share,
        )
        rate = 0.0 if local is None else local
        grid = fed.Grid(servers, tuple(seeds), None, lambda _: local)
        return fed.sweep(task, lambda server: entry.make(server, rate), populations, config, grid)

    def tuned(self, entry: Entry) -> tuple[float, float | None, int]:
        """The best pair of rates, and how many pairs were tried."""
        seeds = range(1000, 1000 + self.arguments.tuning_seeds)
        tried: dict[tuple[int, int], tuple[float, float]] = {}
        alone, scale = entry.local is None, self.arguments.scale
        wanted_servers, wanted_locals = ({*range(-7, 8)}, {0}) if alone else ({*range(-2, 3)}, {-1, 0, 1})

        def rates(a: int, b: int) -> tuple[float, float | None]:
            local = None if entry.local is None else scale * entry.local * 2.0**b
            return scale * entry.server * (FINE if alone else STEP) ** a, local

        while True:
            for b in sorted(wanted_locals):
                new = sorted(a for a in wanted_servers if (a, b) not in tried)
                if not new:
                    continue
                servers = [rates(a, b)[0] for a in new]
                found = self.sweep(entry, self.held, servers, rates(0, b)[1], seeds)
                first, final = found.rounds_to(self.arguments.target).mean(0)[0], found.final().mean(0)[0]
                tried |= {(a, b): (float(first[i]), -float(final[i])) for i, a in enumerate(new)}
            a, b = min(tried, key=lambda pair: tried[pair])
            more_servers, more_locals = set(wanted_servers), set(wanted_locals)
            if a in (min(wanted_servers), max(wanted_servers)):
                more_servers |= {a - 2, a - 1, a + 1, a + 2}
            if entry.local is not None and b in (min(wanted_locals), max(wanted_locals)):
                more_locals |= {b - 1, b + 1}
            if (more_servers, more_locals) == (wanted_servers, wanted_locals):
                return *rates(a, b), len(tried)
            wanted_servers, wanted_locals = more_servers, more_locals

    def row(self, name: str, entry: Entry) -> dict[str, Any]:
        """Tune an entry, and run it with every seed."""
        server, local, count = self.tuned(entry)
        found = self.sweep(entry, self.task, [server], local, range(self.arguments.seeds))
        algorithm = entry.make(server, local or 0.0)
        config = fed.SimulationConfig(
            cohort=self.arguments.cohort,
            local_steps=entry.steps,
            perturbations=entry.perturbations,
            local_learning_rate=local or 0.1,
            backprop_share=entry.share,
        )
        costs = fed.round_costs(self.task, algorithm, config, self.arguments.clients, fed.Participation(fleet=FLEET))
        return {
            "entry": name,
            "server_rate": server,
            "local_rate": local,
            "tried": count,
            "rounds": found.rounds_to(self.arguments.target)[:, 0, 0].tolist(),
            "final": found.final()[:, 0, 0].tolist(),
            "bytes_up": costs.bytes / self.arguments.cohort - 8,
            "forward_passes": costs.passes / self.arguments.cohort,
            "seconds": costs.seconds,
            "accuracy": found.metrics["accuracy"][:, 0, 0].round(4).tolist(),
            "every": entry.every,
        }


def ratio(own: list[float], other: list[float]) -> tuple[float, float, float]:
    """Geometric mean of the paired ratios, with a 95 % interval."""
    logs = np.log(own) - np.log(other)
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    low, middle, high = np.exp(logs.mean() + half * np.array([-1, 0, 1]))
    return float(middle), float(low), float(high)


def main(arguments: Arguments) -> None:
    bench, rows, console = Bench(arguments), [], Console()
    out = arguments.out or Path(f"benchmarks/results/projections_{arguments.task}.json")
    chosen = [word.strip() for word in arguments.entries.split(";") if word]
    for name, entry in ENTRIES.items():
        if not chosen or any(name.startswith(word) for word in chosen):
            rows.append(bench.row(name, entry))
            console.print(
                json.dumps({key: value for key, value in rows[-1].items() if key != "accuracy"}), soft_wrap=True
            )
            settings = {key: str(value) for key, value in vars(arguments).items() if key not in ("data_dir", "out")}
            out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    title = f"{arguments.task}, {arguments.cohort} of {arguments.clients} clients: to accuracy {arguments.target:g}"
    view = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("entry", "rates", "rounds", "of decomfl's", "bytes up", "forward passes", "final"):
        view.add_column(heading)
    base = next((row["rounds"] for row in rows if row["entry"] == "decomfl"), None)
    for row in rows:
        rounds = np.array(row["rounds"])
        share = "" if base is None else "{:.3g} ({:.3g} to {:.3g})".format(*ratio(row["rounds"], base))
        costs = [f"{rounds.mean() * row[cost]:,.0f}" for cost in ("bytes_up", "forward_passes")]
        rates = f"{row['server_rate']:.3g}" + ("" if row["local_rate"] is None else f", {row['local_rate']:.3g}")
        spread = f"{rounds.mean():.1f} ± {rounds.std(ddof=1) if len(rounds) > 1 else 0:.1f}"
        view.add_row(row["entry"], rates, spread, share, *costs, f"{np.mean(row['final']):.3f}")
    console.print(view)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__.split("\n")[0]))
