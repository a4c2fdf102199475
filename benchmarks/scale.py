"""Growth of a round's time and memory with the cohort and with the population.

    python benchmarks/scale.py

Populations are virtual, over the digits, with K = 1, P = 5, batch 32 and HiSo. Every setting runs in a process of its
own, whose peak memory is measured; the time of a round is the median over dispatches of several rounds, after warm-up.
Sampling is timed by itself: the cohort's permutation, the clients' own mixtures and sizes, and the draw of their
batches. With --chunked the setting is a cohort of 10,000 clients at K = 5, all at once and 256 at a time.
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import hiso_jax
from hiso_jax import fed, tasks

BATCH, PERTURBATIONS, DISPATCHES = 32, 5, 7
CHUNKED_COHORTS, CHUNK = (1000, 10_000), 256


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      clients: population sizes, comma-separated.
      cohorts: cohort sizes, comma-separated.
      chunked: measure diverged clients (K = 5) with and without a chunk of 256 instead.
      out: JSON file to write; scale_chunked.json beside it with --chunked.
      worker: measure one setting in this process and print its JSON: "CLIENTS COHORT LOCAL_STEPS CHUNK".
    """

    clients: str = "10000,100000,1000000,10000000"
    cohorts: str = "100,1000,10000"
    chunked: bool = False
    out: Path = Path("benchmarks/results/scale.json")
    worker: str = ""


def timed(function: Any, *arguments: Any) -> float:
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(DISPATCHES):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - begin)
    return median(seconds)


def measure(clients: int, cohort: int, steps: int, chunk: int) -> dict[str, Any]:
    task = tasks.digits()
    population = fed.virtual(task.train["label"], clients, alpha=0.5)
    per_dispatch = max(1, 4000 // (cohort * steps))
    config = fed.SimulationConfig(
        rounds=per_dispatch * DISPATCHES,
        cohort=cohort,
        local_steps=steps,
        perturbations=PERTURBATIONS,
        batch_size=BATCH,
        eval_every=10**6,
        rounds_per_dispatch=per_dispatch,
        local_learning_rate=1e-2,
        client_chunk=chunk or None,
        memory_budget=None if chunk else 2**40,
    )
    ends = [0.0]
    simulation = fed.Simulation(
        task,
        hiso_jax.hiso(1e-2),
        population,
        config,
        callbacks=[fed.Callback(lambda session, _: ends.append(session.seconds))],
    )
    result = simulation.run()
    rounds = np.diff([second for second in ends[1:] if second])[1:] / per_dispatch
    # The peak is that of everything above; the code below needs little beside it.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @jax.jit
    def sample(key):
        chosen = fed.sample_cohort(fed.cohort_key(key, 0), clients, cohort)
        return population.sample(fed.data_key(key, 0), chosen, (steps, BATCH))

    device = jax.devices()[0]
    return {
        "clients": clients,
        "cohort": cohort,
        "local_steps": steps,
        "client_chunk": chunk or None,
        "round_seconds": float(median(rounds)),
        "round_seconds_all": rounds.tolist(),
        "sampling_seconds": timed(sample, jax.random.key(0)),
        "cohort_seconds": timed(jax.jit(lambda key: fed.sample_cohort(key, clients, cohort)), jax.random.key(0)),
        "peak_host_bytes": peak,
        "peak_device_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "first_scalars": result.records.scalars[0].astype(float).tolist() if steps > 1 else None,
        "first_loss": float(result.records.loss[0]),
        "device": device.device_kind,
        "jax": jax.__version__,
    }


def in_its_own_process(clients: int, cohort: int, steps: int, chunk: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", f"{clients} {cohort} {steps} {chunk}"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def populations(arguments: Arguments, console: Console) -> dict[str, Any]:
    cohorts = [int(value) for value in arguments.cohorts.split(",")]
    sizes = [int(value) for value in arguments.clients.split(",")]
    view = Table(title="digits, K = 1, P = 5, batch 32", title_justify="left")
    for column in ("clients", "cohort", "ms a round", "sampling (ms)", "of it the cohort (ms)", "peak memory (MB)"):
        view.add_column(column, justify="right")
    rows = []
    for cohort in cohorts:
        for clients in (size for size in sizes if size >= cohort):
            row = in_its_own_process(clients, cohort, 1, 0)
            rows.append(row)
            figures = [1e3 * row[name] for name in ("round_seconds", "sampling_seconds", "cohort_seconds")]
            memory = f"{row['peak_host_bytes'] / 1e6:.0f}"
            view.add_row(f"{clients:,}", f"{cohort:,}", *(f"{figure:.2f}" for figure in figures), memory)
    console.print(view)
    summary: dict[str, Any] = {"rows": rows, "time_exponent_of_the_cohort": {}, "largest_population_adds": {}}
    for size in sizes:
        points = [(row["cohort"], row["round_seconds"]) for row in rows if row["clients"] == size]
        if len(points) > 1:
            exponent = float(np.polyfit(*np.log(np.array(points)).T, 1)[0])
            summary["time_exponent_of_the_cohort"][size] = exponent
            console.print(f"{size:,} clients: time a round grows as cohort^{exponent:.2f}")
    for cohort in cohorts:
        first, *_, last = [row for row in rows if row["cohort"] == cohort]
        added = {name: last[name] - first[name] for name in ("round_seconds", "peak_host_bytes")}
        summary["largest_population_adds"][cohort] = added
        console.print(
            f"cohort {cohort:,}: {last['clients']:,} clients add {1e3 * added['round_seconds']:.1f} ms a round and "
            f"{added['peak_host_bytes'] / 1e6:.0f} MB to {first['clients']:,}"
        )
    return summary


def chunked(console: Console) -> dict[str, Any]:
    view = Table(title=f"digits, K = 5, P = 5, batch 32, {max(CHUNKED_COHORTS):,} clients", title_justify="left")
    for column in ("cohort", "clients at a time", "s a round", "peak memory (MB)"):
        view.add_column(column, justify="right")
    rows = []
    for cohort in CHUNKED_COHORTS:
        for chunk in (cohort, CHUNK):
            row = in_its_own_process(max(CHUNKED_COHORTS), cohort, 5, chunk)
            rows.append(row)
            memory = f"{row['peak_host_bytes'] / 1e6:.0f}"
            view.add_row(f"{cohort:,}", f"{chunk:,}", f"{row['round_seconds']:.3f}", memory)
    console.print(view)
    whole, part = (np.array(row.pop("first_scalars")) for row in rows[-2:])
    for row in rows:
        row.pop("first_scalars", None)
    difference, tolerance = np.abs(whole - part).max(), 8 * 2**-23 * rows[-1]["first_loss"] / 1e-3
    console.print(f"scalars of the first round differ by at most {difference:.2g}; rounding allows {tolerance:.2g}")
    return {"rows": rows, "scalar_difference": float(difference), "tolerance": tolerance}


def main(arguments: Arguments) -> None:
    if arguments.worker:
        print(json.dumps(measure(*map(int, arguments.worker.split()))))
        return
    console = Console()
    out = arguments.out.with_stem(arguments.out.stem + "_chunked") if arguments.chunked else arguments.out
    result = chunked(console) if arguments.chunked else populations(arguments, console)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
