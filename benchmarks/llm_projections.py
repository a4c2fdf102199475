"""Training of a language model at 20 bytes a round, beside FedAvg: SmolLM2-135M with LoRA on movie reviews.

    python benchmarks/llm_projections.py --model SmolLM2-135M-Instruct.Q4_1.gguf --data-dir FOLDER --cohort 2

FOLDER holds train.jsonl and validation.jsonl with the columns text and label. There are six clients (balanced
Dirichlet, α = 1). Every entry has its own rates, found by coordinate search: the rate of the server, and of the clients
if they take several steps, in factors of three until the best is inside the grid. Every setting runs ``--tune-rounds``
rounds, and its score is the loss on training examples held out from the clients, with a seed apart from the reported
ones. Then every seed runs its rounds on the validation split. Cohorts, batches and initial parameters are
paired. A gradient counts as three forward passes. Results are written after every run, and a run that is in the file is
not made again, so the script can be stopped and called again.

``--diagnose`` instead measures the limits of projections where training begins, see :meth:`Bench.diagnose`.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.flatten_util import ravel_pytree

from hiso_jax import algorithms, fed
from hiso_jax.algorithms._local import gradients, local_sgd
from hiso_jax.models import lm
from hiso_jax.tasks.text import text_task

CLIENTS = 6
GAIN = 2 / math.pi
"""The share of a normal number's energy that its sign keeps."""
# Random signs along which a trace is estimated.
SIGNS = 4


@dataclass(frozen=True)
class Entry:
    """A way of measuring and sending.

    Attributes:
      make: (server's rate, clients' rate) → the algorithm.
      server: the first guess of the server's rate.
      perturbations: P.
      steps: K.
      local: the first guess of the clients' rate; None for one local step.
      fixed: whether the server's rate is not tuned.
      rounds: rounds of the reported runs, with an evaluation at every third of them.
    """

    make: Callable[[float, float], fed.Algorithm]
    server: float
    perturbations: int = 1
    steps: int = 1
    local: float | None = None
    fixed: bool = False
    rounds: int = 24


def projected(rate: float, _: float) -> fed.Algorithm:
    """Progress projected on clients' own directions, with one bit for each scalar."""
    algorithm = algorithms.mosaic(rate, scalar_bits=1, sampler="hadamard")
    return replace(algorithm, measure=fed.projections())


def averaged(rate: float, local: float) -> fed.Algorithm:
    """FedAvg with a rate of the server."""
    return fed.Algorithm(optax.sgd(rate), measure=fed.Local(local_sgd(local or 1.0), gradients))


ENTRIES = {
    "FedAvg K = 4": Entry(averaged, 1.0, steps=4, local=1 / 30, fixed=True, rounds=6),
    "gradient, 128 × 1 bit": Entry(projected, 0.1, 128),
    "decomfl": Entry(lambda rate, _: fed.Algorithm(algorithms.decomfl(rate).tx), 0.01, 5),
    "progress K = 4, 128 × 1 bit": Entry(projected, 0.3, 128, 4, 1 / 30, rounds=6),
    "mosaic, 64 × 2 bits": Entry(lambda rate, _: algorithms.mosaic(rate, sampler="hadamard"), 0.3, 64, rounds=9),
}


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      model: SmolLM2-135M as a GGUF file, or any other language model.
      data_dir: folder with train.jsonl and validation.jsonl.
      entries: the beginnings of their names, separated by semicolons; all by default.
      cohort: clients a round.
      tune_rounds: rounds of each setting of the search.
      held_out: training examples that score the search.
      test: validation examples that score the reported runs.
      seeds: number of reported seeds, from 0.
      tuning_seed: seed of the search.
      batch_size: examples of a client's local step.
      lora_rank: rank of the trained products.
      warm_rate: the clients' rate in the rounds before the second diagnosis.
      diagnose: measure κ and the curvature in place of training.
      out: JSON file to write, and to continue.
    """

    model: str
    data_dir: Path
    entries: str = ""
    cohort: int = 2
    tune_rounds: int = 5
    held_out: int = 128
    test: int = 300
    seeds: int = 3
    tuning_seed: int = 1000
    batch_size: int = 8
    lora_rank: int = 8
    warm_rate: float = 0.1
    diagnose: bool = False
    out: Path = Path("benchmarks/results/llm_projections.json")


class Bench:
    """The task and the file of results."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        pretrained = lm.load(arguments.model, dtype="float32")
        task = text_task(
            "text-classification",
            lm.tune(pretrained, "lora", lora_rank=arguments.lora_rank),
            pretrained,
            data_dir=arguments.data_dir,
            template="{text} It was",
            verbalizer=(" bad", " good"),
        )
        self.held = task.hold_out(arguments.held_out, seed=arguments.tuning_seed)
        self.task = replace(task, test=jax.tree.map(lambda x: x[: arguments.test], task.test))
        self.report = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"runs": {}}

    def save(self) -> None:
        """Write the file."""
        self.arguments.out.write_text(json.dumps(self.report, indent=1) + "\n")

    def run(self, name: str, rates: tuple[float, float | None], seed: int, *, tuning: bool) -> dict[str, Any]:
        """One run, or its record if it is in the file."""
        own, entry = self.arguments, ENTRIES[name]
        rounds = own.tune_rounds if tuning else entry.rounds
        label = f"{name} | cohort {own.cohort} | rank {own.lora_rank} | rates {rates[0]:.3g}"
        label += ("" if rates[1] is None else f", {rates[1]:.3g}") + f" | seed {seed} | {rounds} rounds"
        if label in self.report["runs"]:
            return self.report["runs"][label]
        task = self.held if tuning else self.task
        population = fed.dirichlet_balanced(task.train["label"], CLIENTS, alpha=1.0, seed=seed)
        config = fed.SimulationConfig(
            rounds=rounds,
            cohort=own.cohort,
            local_steps=entry.steps,
            perturbations=entry.perturbations,
            local_learning_rate=rates[1],
            batch_size=own.batch_size,
            eval_every=rounds if tuning else rounds // 3,
            seed=seed,
        )
        begin = time.perf_counter()
        result = fed.Simulation(task, entry.make(rates[0], rates[1] or 0.0), population, config).run()
        record = {
            "entry": name,
            "rates": rates,
            "cohort": own.cohort,
            "seed": seed,
            "tuning": tuning,
            "round": [row.round for row in result.metrics],
            "accuracy": [row.metrics["accuracy"] for row in result.metrics],
            "loss": [row.metrics["loss"] for row in result.metrics],
            "diverged_at": result.diverged_at,
            "bytes_up": result.traffic["bytes_up_per_client"],
            "forward_passes": result.forward_passes / own.cohort,
            "wall_seconds": time.perf_counter() - begin,
            "compile_seconds": result.compile_seconds,
        }
        self.report["runs"][label] = record
        self.save()
        columns = (record["round"], record["accuracy"], record["loss"])
        curve = ", ".join(f"{at}: {right:.3f} ({lost:.3f})" for at, right, lost in zip(*columns, strict=True))
        print(f"{label} | {record['wall_seconds']:.0f} s | {curve}", flush=True)
        return record

    def score(self, name: str, rates: tuple[float, float | None]) -> float:
        """The held-out loss at the end of a tuning run."""
        found = self.run(name, rates, self.arguments.tuning_seed, tuning=True)
        return math.inf if found["diverged_at"] is not None else found["loss"][-1]

    def along(self, score: Callable[[float], float], first: float) -> float:
        """The best rate of a grid in factors of three, which grows until the best is inside."""
        tried = {step: score(first * 3.0**step) for step in (-1, 0, 1)}
        while True:
            best = min(tried, key=lambda step: tried[step])
            if best not in (min(tried), max(tried)):
                return first * 3.0**best
            step = best - 1 if best == min(tried) else best + 1
            tried[step] = score(first * 3.0**step)

    def tuned(self, name: str) -> tuple[float, float | None]:
        """The best rates: of the server at the clients' first guess, then of the clients."""
        entry = ENTRIES[name]
        local, server = entry.local, entry.server
        if not entry.fixed:
            server = self.along(lambda rate: self.score(name, (rate, local)), server)
        if local is not None:
            local = self.along(lambda rate: self.score(name, (server, rate)), local)
        return server, local

    def diagnose(self) -> None:
        """Measure the limits of a round of projections, at the initial parameters and after FedAvg's tuning rounds.

        With own directions Δ = mean m + noise; E|noise|² / |mean m|² = (d / P·C) · κ / gain, where κ = mean |m_i|² /
        |mean m_i|². A step η along Δ changes the loss by −η |ḡ|² + η²/2 · (ḡᵀHḡ + E[noiseᵀ H noise]). Isotropic noise
        costs tr(H) / d for each unit of its energy, so the effective dimension D = tr(H) |ḡ|² / ḡᵀHḡ takes the place
        of d. The rounds that projections need are 1 + D · κ / (P·C·gain) times those that vectors need.
        """
        task, own = self.task, self.arguments
        frozen, train = (jax.tree.map(jnp.asarray, tree) for tree in (fed.task.frozen_of(task), task.train))
        population = fed.dirichlet_balanced(task.train["label"], CLIENTS, alpha=1.0, seed=0)
        initial, unravel = ravel_pytree(task.init(jax.random.key(0)))
        size = len(initial)

        @jax.jit
        def progress(x: jax.Array, rows: jax.Array, rate: float, train: Any, frozen: Any) -> jax.Array:
            def loss(params: Any, batch: Any) -> jax.Array:
                return fed.task.bind(task.loss, frozen)(params, batch).mean()

            batches = jax.tree.map(lambda leaf: leaf[rows], train)
            return ravel_pytree(fed.measure.progress_of(loss, unravel(x), batches, rate)[0])[0]

        def of_clients(x: Any, steps: int = 1, batch: int = 8, rate: float = 0.0) -> np.ndarray:
            """m_i of every client, [6, d]; for one step the gradients."""
            rows = population.sample(jax.random.key(7), jnp.arange(CLIENTS), (steps, batch))
            return np.stack([progress(jnp.asarray(x), each, rate, train, frozen) for each in rows])

        def curvature(x: np.ndarray, direction: np.ndarray, length: float) -> float:
            """vᵀHv for v = ``direction`` at length 1, from gradients at a distance of ``length`` to both sides."""
            v = direction / np.linalg.norm(direction)
            ends = [of_clients(x + by * v).mean(0) @ v for by in (length, -length)]
            return float(ends[0] - ends[1]) / (2 * length)

        config = fed.SimulationConfig(
            rounds=own.tune_rounds,
            cohort=2,
            local_steps=4,
            local_learning_rate=own.warm_rate,
            batch_size=8,
            eval_every=own.tune_rounds,
        )
        warm = fed.Simulation(task, averaged(1.0, own.warm_rate), population, config).run().params
        found = self.report.setdefault("diagnosis", {"parameters": size, "warm_rate": own.warm_rate})
        for name, params in (("initial", initial), ("after FedAvg", ravel_pytree(warm)[0])):
            x = np.asarray(params)
            gradient = of_clients(x).mean(0)
            signs = np.random.default_rng(9).choice(np.array([-1, 1], np.float32), size=(SIGNS, size))
            traces = [size * curvature(x, z, 0.5) for z in signs]
            bend = curvature(x, gradient, 0.1)
            dimension = float(np.mean(traces)) / bend
            here: dict[str, Any] = {
                "traces": traces,
                "curvature_along_gradient": bend,
                "effective_dimension": dimension,
            }
            for steps, batch, rate in ((1, 8, 0.0), (1, 32, 0.0), (4, 8, 0.033), (4, 8, 0.1)):
                each = of_clients(x, steps, batch, rate)
                kappas = {cohort: kappa(each, cohort) for cohort in (2, CLIENTS)}
                here[f"K = {steps}, batch {batch}" + (f", rate {rate:g}" if rate else "")] = {
                    "kappa": kappas,
                    "noise": {c: size / (128 * c) * k / GAIN for c, k in kappas.items()},
                    "slowdown": {c: 1 + dimension * k / (128 * c * GAIN) for c, k in kappas.items()},
                }
            found[name] = here
            print(name, json.dumps(here), flush=True)
            self.save()


def kappa(each: np.ndarray, cohort: int) -> float:
    """κ = mean |m_i|² / |mean m_i|² of cohorts of the clients' progress [6, d], over all cohorts of a size."""
    cohorts = [each[list(chosen)] for chosen in combinations(range(len(each)), cohort)]
    energy = np.mean([(own**2).sum(1).mean() for own in cohorts])
    return float(energy / np.mean([(own.mean(0) ** 2).sum() for own in cohorts]))


def main(arguments: Arguments) -> None:
    bench = Bench(arguments)
    if arguments.diagnose:
        bench.diagnose()
        return
    chosen = [word.strip() for word in arguments.entries.split(";") if word]
    for name in ENTRIES:
        if not chosen or any(name.startswith(word) for word in chosen):
            rates = bench.tuned(name)
            for seed in range(arguments.seeds):
                bench.run(name, rates, seed, tuning=False)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__.split("\n")[0]))
