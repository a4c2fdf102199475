"""Rounds a second, peak memory and floor ratio of MNIST rounds.

    python benchmarks/round_throughput.py --data-dir FOLDER_WITH_IDX_FILES

The floor ratio is the median round time over (forward evaluations per client) × the median time of one jitted
evaluation of the same loss over the whole cohort, in the fastest layout of one flat batch, vmap and map. For local
steps after the first, and where every client has directions of its own (mosaic), it is the fastest layout with
distinct weights per client. Rounds are whole: sampling the cohort and its batches, the scalars, the update, the
curvature, and the divergence check. Rounds and evaluations are timed in turn in one process; memory is measured in
another, which runs rounds only.
"""

import json
import math
import resource
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from hiso_jax import algorithms, fed, models, tasks

CLIENTS = 64
BATCH = 32
METHODS = {
    "hiso": lambda: algorithms.hiso(1e-3),
    "mosaic": lambda: algorithms.mosaic(1e-3),
    "fed_avg": lambda: algorithms.fed_avg(1e-3),
}


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      data_dir: folder with MNIST's IDX files; without it random bytes of MNIST's shape take their place.
      cohorts: cohort sizes, comma-separated.
      local_steps: values of K, comma-separated.
      method: hiso, mosaic, or fed_avg.
      perturbations: P.
      repeats: timed dispatches per setting.
      client_chunk: clients evaluated at a time once they have diverged; 0 leaves it to the library.
      out: JSON file to write.
      worker: measure one setting in this process and print its JSON: "time K C" or "memory K C".
    """

    data_dir: Path | None = None
    cohorts: str = "8,64"
    local_steps: str = "1,5"
    method: Literal["hiso", "mosaic", "fed_avg"] = "hiso"
    perturbations: int = 5
    repeats: int = 9
    client_chunk: int = 0
    out: Path = Path("benchmarks/results/round_throughput.json")
    worker: str = ""


def load_task(data_dir: Path | None) -> tasks.Classification:
    if data_dir:
        return tasks.mnist(data_dir)
    rng = np.random.default_rng(0)
    network = models.cnn(side=28, kernel=5, features=(16, 32))
    data = {
        "input": rng.integers(0, 256, (60_000, 28, 28, 1), np.uint8),
        "label": rng.integers(0, 10, 60_000).astype(np.int32),
    }
    test = {name: array[:512] for name, array in data.items()}
    return tasks.Classification(
        network.init, lambda params, x: network.apply(params, x.astype(jnp.float32) / 255), data, test
    )


def evaluations(task, cohort, *, gradients):
    """One evaluation of the cohort's losses, or gradients, in every layout: shared weights, then distinct ones."""
    params = task.init(jax.random.key(1))
    rows = np.random.default_rng(1).integers(0, len(task.train["label"]), (cohort, BATCH))
    batch = {name: jnp.asarray(array[rows]) for name, array in task.train.items()}
    own = jax.tree.map(lambda x: jnp.repeat(x[None], cohort, 0), params)

    def loss(params, examples):
        return task.loss(params, examples).mean()

    if gradients:
        # The mean gradient of clients with the same weights is one gradient, so that their own are taken here, too.
        each = jax.value_and_grad(loss)

        def summed(total, client):
            return jax.tree.map(jnp.add, total, each(*client)[1]), None

        distinct = {
            "map": (jax.jit(lambda p, b: jax.lax.scan(summed, jax.tree.map(lambda x: x[0], p), (p, b))), (own, batch)),
        }
        return {"shared": distinct, "distinct": distinct}

    flat = {name: array.reshape(-1, *array.shape[2:]) for name, array in batch.items()}
    shared = {
        "flat": (jax.jit(lambda p, b: task.loss(p, b).reshape(cohort, BATCH).mean(1)), (params, flat)),
        "vmap": (jax.jit(jax.vmap(loss, (None, 0))), (params, batch)),
        "map": (jax.jit(lambda p, b: jax.lax.map(lambda x: loss(p, x), b)), (params, batch)),
    }
    distinct = {
        "vmap": (jax.jit(jax.vmap(loss)), (own, batch)),
        "map": (jax.jit(lambda p, b: jax.lax.map(lambda x: loss(*x), (p, b))), (own, batch)),
    }
    if cohort > 64:
        # A map over thousands of batches is known to be slower, and is not worth minutes.
        del shared["map"]
    return {"shared": shared, "distinct": distinct}


def simulate(arguments, steps, cohort, callback, rounds_per_dispatch, repeats):
    task = load_task(arguments.data_dir)
    population = fed.iid(len(task.train["label"]), max(CLIENTS, cohort))
    config = fed.SimulationConfig(
        rounds=rounds_per_dispatch * repeats,
        cohort=cohort,
        local_steps=steps,
        perturbations=None if arguments.method == "fed_avg" else arguments.perturbations,
        batch_size=BATCH,
        eval_every=10**6,
        rounds_per_dispatch=rounds_per_dispatch,
        local_learning_rate=1e-3,
        client_chunk=arguments.client_chunk or None,
    )
    return fed.Simulation(
        task, METHODS[arguments.method](), population, config, callbacks=[fed.Callback(callback)]
    ).run()


def measure_time(arguments, steps, cohort):
    first_order = arguments.method == "fed_avg"
    layouts = evaluations(load_task(arguments.data_dir), cohort, gradients=first_order)
    own = arguments.method == "mosaic"
    if steps == 1 and not own:
        layouts["distinct"] = {}
    times = defaultdict(list)
    for choices in layouts.values():
        for function, inputs in choices.values():
            jax.block_until_ready(function(*inputs))
    # A dispatch is short enough to take turns with the evaluations, and long enough that its overhead is no matter.
    per_dispatch = max(1, math.ceil(64 / (cohort * steps)))
    rounds, last = [], [0.0]

    def turn(session, evaluation):
        if session.round:
            rounds.append((session.seconds - last[0]) / per_dispatch)
            last[0] = session.seconds
        for kind, choices in layouts.items():
            for name, (function, inputs) in choices.items():
                begin = time.perf_counter()
                jax.block_until_ready(function(*inputs))
                times[kind, name].append(time.perf_counter() - begin)

    simulate(arguments, steps, cohort, turn, per_dispatch, arguments.repeats + 1)
    medians = {key: median(values[1:]) for key, values in times.items()}
    shared = min((seconds, name) for (kind, name), seconds in medians.items() if kind == "shared")
    distinct = min(((s, name) for (kind, name), s in medians.items() if kind == "distinct"), default=(0.0, "-"))
    perturbations = 0 if first_order else arguments.perturbations
    evaluations_of_first = shared[0] + perturbations * (distinct if own else shared)[0]
    floor = evaluations_of_first + (perturbations + 1) * (steps - 1) * distinct[0]
    round_seconds = median(rounds[1:])
    return {
        "rounds_per_second": 1 / round_seconds,
        "round_seconds": round_seconds,
        "round_seconds_all": rounds[1:],
        "floor_seconds": floor,
        "floor_ratio": round_seconds / floor,
        "fastest_shared": shared[1],
        "fastest_distinct": distinct[1],
        "evaluation_seconds": {f"{kind}/{name}": seconds for (kind, name), seconds in medians.items()},
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def measure_memory(arguments, steps, cohort):
    simulate(arguments, steps, cohort, lambda session, evaluation: None, 1, 3)
    stats = jax.devices()[0].memory_stats()
    if stats:
        return {"peak_device_bytes": stats["peak_bytes_in_use"]}
    return {"peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def main(arguments: Arguments) -> None:
    if arguments.worker:
        what, *numbers = arguments.worker.split()
        measure = measure_time if what == "time" else measure_memory
        print(json.dumps(measure(arguments, *map(int, numbers))))
        return
    console = Console()
    source = "MNIST" if arguments.data_dir else "random bytes of MNIST's shape"
    view = Table(
        title=f"{source}, {arguments.method}, P = {arguments.perturbations}, batch {BATCH}, forward differences",
        title_justify="left",
    )
    for column in ("K", "cohort", "rounds/s", "floor ratio", "peak memory (MB)", "floor layout"):
        view.add_column(column, justify="right")
    rows = []
    for steps in map(int, arguments.local_steps.split(",")):
        for cohort in map(int, arguments.cohorts.split(",")):
            row: dict[str, Any] = {"local_steps": steps, "cohort": cohort}
            for what in ("time", "memory"):
                command = [sys.executable, __file__, "--worker", f"{what} {steps} {cohort}"]
                command += ["--repeats", str(arguments.repeats), "--client-chunk", str(arguments.client_chunk)]
                command += ["--method", arguments.method, "--perturbations", str(arguments.perturbations)]
                command += ["--data-dir", str(arguments.data_dir)] if arguments.data_dir else []
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                row |= json.loads(output.splitlines()[-1])
            rows.append(row)
            memory = row.get("peak_device_bytes") or row["peak_host_bytes"]
            layout = row["fastest_shared"] + ("" if steps == 1 else f", {row['fastest_distinct']}")
            view.add_row(
                str(steps),
                str(cohort),
                f"{row['rounds_per_second']:.3g}",
                f"{row['floor_ratio']:.3f}",
                f"{memory / 1e6:.0f}",
                layout,
            )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"data": source, "rows": rows}, indent=2) + "\n")
    console.print(view)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
