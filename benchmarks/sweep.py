"""A sweep as one vmapped program beside the same runs one by one.

    python benchmarks/sweep.py

8 learning rates × 4 seeds of HiSo on the digits. The single run is compiled once, with rate and seed as arguments;
runs and sweeps take turns in one process, the same rounds and evaluations in both.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

import hiso_jax
from hiso_jax import fed, tasks
from hiso_jax.fed.measure import Estimator
from hiso_jax.fed.round import server_round
from hiso_jax.fed.run import monitor
from hiso_jax.fed.run.dispatch import make_dispatch
from hiso_jax.fed.run.invitation import draw_batches
from hiso_jax.fed.run.programs import costs_of
from hiso_jax.fed.run.state import Inputs, RunState
from hiso_jax.fed.update import ServerState

RATES = tuple(float(rate) for rate in np.geomspace(0.001, 0.1, 8))
SEEDS = (0, 1, 2, 3)


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      rounds: rounds of a run.
      repeats: timed turns of runs and of sweeps.
      out: JSON file to write.
    """

    rounds: int = 300
    repeats: int = 3
    out: Path = Path("benchmarks/results/sweep.json")


def single(task: tasks.Classification, config: fed.SimulationConfig) -> tuple[Any, float]:
    """One run, ``(rate, seed key, population) → accuracies``, compiled once; and the seconds of compilation."""
    train, test = (jax.tree.map(jnp.asarray, dict(split)) for split in (task.train, task.test))

    def segment(carry, rate, key, population, begin, end):
        algorithm = fed.Algorithm(hiso_jax.hiso(rate))
        estimator = Estimator(fed.probes(), config.local_steps, config.perturbations, config.mu)
        settings = fed.ExecutionSettings()
        run_round = server_round(task.loss, algorithm, estimator, settings, draw_batches(config))
        costs = costs_of(algorithm, estimator, carry.server, config)
        dispatch = make_dispatch(run_round, config, costs, config.eval_every)
        carry, _ = dispatch(carry, begin, end, Inputs(key, train, population, fed.Participation()))
        return carry, fed.make_evaluate(task.metrics)(carry.server.params, test)

    def start(key):
        params = task.init(fed.init_key(key))
        return RunState(ServerState(params, hiso_jax.hiso(0.1).init(params)), monitor.start(), None)

    def arguments(seed):
        population = fed.dirichlet(task.train["label"], 100, alpha=0.5, seed=seed)
        return jax.random.key(seed), jax.tree.map(jnp.asarray, population)

    begin = time.perf_counter()
    zero = jnp.int32(0)
    key, population = arguments(0)
    program = (
        jax.jit(segment, donate_argnums=0).lower(start(key), jnp.float32(0.1), key, population, zero, zero).compile()
    )
    compile_seconds = time.perf_counter() - begin

    def run(rate: float, seed: int) -> list[float]:
        key, population = arguments(seed)
        carry, accuracies, done = start(key), [], 0
        for end in [0, *range(config.eval_every, config.rounds + 1, config.eval_every)]:
            bounds = jnp.int32(done), jnp.int32(end)
            carry, metrics = jax.block_until_ready(program(carry, jnp.float32(rate), key, population, *bounds))
            accuracies.append(float(metrics["accuracy"].mean()))
            done = end
        return accuracies

    return run, compile_seconds


def main(arguments: Arguments) -> None:
    console, task = Console(), tasks.digits()
    config = fed.SimulationConfig(rounds=arguments.rounds)
    populations = [fed.dirichlet(task.train["label"], 100, alpha=0.5, seed=seed) for seed in SEEDS]
    run, single_compile = single(task, config)
    run(RATES[0], SEEDS[0])
    one_by_one, together, compiles = [], [], []
    for _ in range(arguments.repeats):
        begin = time.perf_counter()
        curves = [[run(rate, seed) for rate in RATES] for seed in SEEDS]
        one_by_one.append(time.perf_counter() - begin)
        result = fed.sweep(task, hiso_jax.hiso, populations, config, fed.Grid(RATES, SEEDS))
        together.append(result.run_seconds)
        compiles.append(result.compile_seconds)
    ratios = [b / a for a, b in zip(one_by_one, together, strict=True)]
    with_compilation = [(b + c) / (a + single_compile) for a, b, c in zip(one_by_one, together, compiles, strict=True)]
    # The runs are the same; rounding separates them late, so their curves lie close.
    difference = float(np.abs(np.array(curves) - result.metrics["accuracy"][:, 0]).mean())
    row = {
        "setting": {"rates": RATES, "seeds": SEEDS, "rounds": config.rounds, "eval_every": config.eval_every},
        "one_by_one_seconds": one_by_one,
        "sweep_seconds": together,
        "ratio": median(ratios),
        "ratios": ratios,
        "single_compile_seconds": single_compile,
        "sweep_compile_seconds": compiles,
        "ratio_with_compilation": median(with_compilation),
        "mean_accuracy_difference": difference,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    console.print(
        f"{len(RATES)} rates × {len(SEEDS)} seeds, {config.rounds} rounds: one by one {median(one_by_one):.1f} s, "
        f"as a sweep {median(together):.1f} s, ratio {row['ratio']:.2f}; with compilation "
        f"({single_compile:.1f} s and {median(compiles):.1f} s) {row['ratio_with_compilation']:.2f}; "
        f"accuracies differ by {difference:.4f} on average",
        soft_wrap=True,
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
