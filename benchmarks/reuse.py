"""Seconds of a Simulation in a process that ran one before: the same, another seed, population or learning rate.

    HISO_JAX_CACHE=/tmp/empty python benchmarks/reuse.py
    HISO_JAX_CACHE=off python benchmarks/reuse.py

Each line is the construction and the run of 60 rounds of the digits, 8 of 50 clients.
"""

import time
from dataclasses import dataclass

import tyro

import hiso_jax
from hiso_jax import fed, tasks


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      algorithm: name of the method.
      rate: its learning rate; the other one is two thirds of it.
    """

    algorithm: str = "decomfl"
    rate: float = 0.03


def main(arguments: Arguments) -> None:
    task, factory = tasks.digits(), hiso_jax.algorithms.FACTORIES[arguments.algorithm]
    for said, seed, alpha, rate in (
        ("first", 0, 0.5, arguments.rate),
        ("again", 0, 0.5, arguments.rate),
        ("another seed", 1, 0.5, arguments.rate),
        ("another population", 1, 0.1, arguments.rate),
        ("another rate", 1, 0.1, arguments.rate * 2 / 3),
    ):
        begin, cpu = time.perf_counter(), time.process_time()
        population = fed.dirichlet(task.train["label"], 50, alpha=alpha, seed=seed)
        config = fed.SimulationConfig(rounds=60, cohort=8, eval_every=20, seed=seed)
        result = hiso_jax.Simulation(task, factory(rate), population, config).run()
        spent = time.perf_counter() - begin, time.process_time() - cpu, result.compile_seconds
        print(f"{said:20} {spent[0]:5.2f} s, CPU {spent[1]:5.2f} s, of which compiling {spent[2]:5.2f} s")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
