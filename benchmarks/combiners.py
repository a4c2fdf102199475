"""The cost of combining beside the cost of its round, at a cohort of 10,000; and the cost of the guard in a run.

    python benchmarks/combiners.py --out results/combiners.json

The script times a round of the digits' model (32 examples a client and five directions) and, by itself, every combiner
on its messages, in turn. Then it times runs with and without the guard, alternately; no client is hostile.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from hiso_jax import algorithms, channels, fed, tasks


@dataclass(frozen=True)
class Settings:
    """Options of the script.

    Attributes:
      cohort: number of clients.
      repeats: number of each measurement; medians are reported.
      out: JSON to write.
    """

    cohort: int = 10_000
    repeats: int = 7
    out: Path | None = None


def seconds(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - begin


def in_turn(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Medians of alternating measurements, after a first call of each function that compiles it."""
    for function in functions.values():
        jax.block_until_ready(function())
    taken = [{name: seconds(function) for name, function in functions.items()} for _ in range(repeats)]
    return {name: float(np.median([each[name] for each in taken])) for name in functions}


def combining(settings: Settings) -> dict[str, float]:
    """Seconds of a round, and of every way to combine its messages."""
    task, rng = tasks.digits(), np.random.default_rng(0)
    chosen = rng.integers(0, len(task.train["label"]), (settings.cohort, 1, 32))
    batches = jax.tree.map(lambda leaf: jnp.asarray(leaf)[chosen], task.train)
    params, mask = task.init(jax.random.key(0)), jnp.ones(settings.cohort, bool)
    plain = algorithms.load("decomfl").build(0.03, {"guard": False})
    run = jax.jit(fed.make_round(task.loss, plain, local_steps=1, num_perturbations=5, mu=1e-3))
    state = plain.optimizer.init(params)
    messages = run(params, state, batches, mask, jax.random.key(1))[2].scalars
    weights, key = jnp.ones(settings.cohort), jax.random.key(2)
    functions: dict[str, Callable[[], Any]] = {"round": lambda: run(params, state, batches, mask, jax.random.key(1))}
    for name in channels.names_of("combine"):
        made = channels.FACTORIES[name]()
        if made.noise is None:
            function = jax.jit(made.apply)
            functions[name] = lambda function=function: function(messages, weights, key)
    for name in channels.names_of("rescale"):
        clip = channels.FACTORIES[name]()
        first = () if clip.init is None else clip.init(messages)
        shorten = jax.jit(clip.advance)
        functions[name] = lambda shorten=shorten, first=first: shorten(messages, weights, first)
    return in_turn(functions, settings.repeats)


def guarding(settings: Settings) -> dict[str, float]:
    """The time of runs on the digits with the guard over the time without it."""
    task = tasks.digits()
    population = fed.dirichlet(task.train["label"], 100, alpha=0.5)
    ratios = {}
    for name in ("hiso", "decomfl", "mosaic"):
        method = algorithms.load(name)
        rounds = 400 if name == "mosaic" else 2000
        config = fed.SimulationConfig(rounds=rounds, cohort=10, eval_every=rounds)
        taken: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(settings.repeats):
            for guard in taken:
                algorithm = method.build(method.rate("digits"), {"guard": guard})
                result = fed.Simulation(task, algorithm, population, config).run()
                taken[guard].append(result.run_seconds)
        ratios[name] = float(np.median(np.array(taken[True]) / np.array(taken[False])))
    return ratios


def main(settings: Settings) -> None:
    """Measure, print, and write."""
    found = combining(settings)
    whole = found["round"]
    for name, value in found.items():
        print(f"{name:18} {1e3 * value:9.1f} ms  {value / whole:7.3f} of a round of {settings.cohort:,}")
    guards = guarding(settings)
    for name, ratio in guards.items():
        print(f"a round of {name} with the guard takes {ratio:.3f} of one without")
    if settings.out is not None:
        settings.out.write_text(json.dumps({"cohort": settings.cohort, "seconds": found, "guard": guards}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
