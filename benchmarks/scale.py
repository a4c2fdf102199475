"""Growth of a round's time and memory with clients, cohort, parameters and devices.

    python benchmarks/scale.py                                # all axes, a quarter of an hour
    python benchmarks/scale.py --axes parameters,devices

One setting is varied at a time. Every point is a run in a process of its own (two processes for the last point of the
devices), whose peak memory is measured; the time of a round is the median over dispatches, after warm-up. The local
exponent of a row is that of the growth from the row above: 1 is proportional. A point that a process does not survive,
or that exceeds --seconds, is in the table as such.

- clients: 10² to 10⁷ virtual clients over the digits, 64 a round, HiSo, P = 5, batch 32.
- cohort: 8 to 65,536 of 10⁷ clients, otherwise the same.
- chunked: the same cohort at K = 5, all at once and 256 at a time.
- parameters: 10³ to 10⁹, a perceptron of two square hidden layers on the digits, 2 clients a round, P = 1, batch 8,
  DeComFL; Gaussian directions in float32, and low-rank directions in bfloat16.
- devices: 1 to 8 virtual CPU devices of one process, and 2 processes of one device; 1,024 clients a round.
"""

import json
import math
import os
import resource
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

DISPATCHES = 5


@dataclass(frozen=True)
class Point:
    """A setting of the table.

    Attributes:
      clients: N.
      cohort: clients a round.
      parameters: d, about; 0 is the perceptron of the digits, 2,410.
      perturbations: P.
      batch: examples of a client and local step.
      local_steps: K.
      chunk: clients in memory at a time; 0 leaves it to the library.
      dtype: of the parameters.
      sampler: of DeComFL's directions; HiSo if empty.
      devices: virtual CPU devices.
      processes: processes of one job.
    """

    clients: int = 10_000_000
    cohort: int = 64
    parameters: int = 0
    perturbations: int = 5
    batch: int = 32
    local_steps: int = 1
    chunk: int = 0
    dtype: str = "float32"
    sampler: Literal["", "gaussian", "low_rank"] = ""
    devices: int = 1
    processes: int = 1


KINDS: list[tuple[str, str, Literal["gaussian", "low_rank"]]] = [
    ("float32", "float32", "gaussian"),
    ("bfloat16, low rank", "bfloat16", "low_rank"),
]
LARGE = Point(clients=100, cohort=2, perturbations=1, batch=8, sampler="gaussian")
WIDE = Point(clients=100_000, cohort=1024)
CHUNKED = Point(clients=10_000, cohort=10_000, local_steps=5)
AXES: dict[str, list[tuple[str, float, Point]]] = {
    "clients": [(f"{10**e:,}", 10**e, Point(clients=10**e)) for e in range(2, 8)],
    "cohort": [(f"{c:,}", c, Point(cohort=c)) for c in (8, 64, 512, 4096, 16_384, 65_536)],
    "chunked": [("all at once", 1, replace(CHUNKED, chunk=10_000)), ("256 at a time", 1, replace(CHUNKED, chunk=256))],
    "parameters": [
        (f"10^{e} {name}", 10**e, replace(LARGE, parameters=10**e, dtype=dtype, sampler=sampler))
        for name, dtype, sampler in KINDS
        for e in range(3, 10)
    ],
    "devices": [
        *((f"{n} devices", n, replace(WIDE, devices=n)) for n in (1, 2, 4, 8)),
        ("2 processes", 2, replace(WIDE, processes=2)),
    ],
}


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      axes: comma-separated, of clients, cohort, chunked, parameters, devices.
      seconds: the longest that one point may take.
      out: JSON file to write after every point; axes that are not measured keep their rows.
      worker: measure one point in this process and print its JSON.
    """

    axes: str = ",".join(AXES)
    seconds: float = 600.0
    out: Path = Path("benchmarks/results/scale.json")
    worker: str = ""


def task_of(point: Point) -> Any:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from hiso_jax import models, tasks
    from hiso_jax.models.functional import Linear

    digits = tasks.digits()
    if not point.parameters:
        return digits
    # 64 inputs and 10 classes: d = h² + 75 h + 10.
    width = round((math.sqrt(75**2 + 4 * point.parameters) - 75) / 2)

    class Perceptron(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first, self.second = Linear(64, width, rngs=rngs), Linear(width, width, rngs=rngs)
            self.output = Linear(width, 10, rngs=rngs)

        def __call__(self, images: Any) -> Any:
            x = images.reshape(len(images), -1).astype(point.dtype)
            return self.output(nnx.relu(self.second(nnx.relu(self.first(x)))))

    model = models.functional(Perceptron)

    # Drawn leaf by leaf in its own dtype, so that making the weights takes no more memory than they do.
    def init(key: Any) -> Any:
        leaves, structure = jax.tree.flatten(jax.eval_shape(model.init, key))
        keys = jax.random.split(key, len(leaves))
        made = [
            jax.random.normal(k, x.shape, point.dtype) / max(x.shape) ** 0.5 for k, x in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, made)

    def apply(params: Any, inputs: Any) -> Any:
        return model.apply(params, inputs).astype(jnp.float32)

    return tasks.Classification(init, apply, digits.train, digits.test, perturbed_as=model.perturbed_as)


def measure(point: Point) -> dict[str, Any]:
    import jax
    import numpy as np

    import hiso_jax
    from hiso_jax import fed

    task = task_of(point)
    sampler = point.sampler
    method = hiso_jax.decomfl(1e-4, sampler=sampler) if sampler else hiso_jax.hiso(1e-2)
    work = point.cohort * point.local_steps * max(1, point.parameters // 10_000)
    per_dispatch = max(1, 2000 // work)
    ends: list[float] = []
    simulation = fed.Simulation(
        task,
        method,
        fed.virtual(task.train["label"], point.clients, alpha=0.5),
        fed.SimulationConfig(
            rounds=per_dispatch * (DISPATCHES + 1),
            cohort=point.cohort,
            local_steps=point.local_steps,
            perturbations=point.perturbations,
            batch_size=point.batch,
            eval_every=10**9,
            rounds_per_dispatch=per_dispatch,
            local_learning_rate=1e-2 if point.local_steps > 1 else None,
            client_chunk=point.chunk or None,
        ),
        callbacks=[fed.Callback(lambda session, _: ends.append(session.seconds))],
        mesh=fed.make_mesh() if point.devices * point.processes > 1 else None,
    )
    simulation.run()
    seconds = np.diff([second for second in ends if second])[-DISPATCHES:] / per_dispatch
    device = jax.local_devices()[0]
    return {
        "point": asdict(point),
        "trained": sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0)))),
        "round_seconds": float(median(seconds)),
        "round_seconds_all": seconds.tolist(),
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "device": device.device_kind,
        "jax": jax.__version__,
    }


def worker(words: str) -> None:
    """Measure a point; the words are its JSON and, in a job of several processes, the address and the process."""
    point, address, process = json.loads(words)
    point = Point(**point)
    import jax

    if point.processes > 1:
        jax.distributed.initialize(address, point.processes, process)
    found = measure(point)
    if process == 0:
        print(json.dumps(found))


def in_processes(point: Point, seconds: float) -> dict[str, Any]:
    """The figures of a point, or why there are none."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={point.devices}"
    running = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps([asdict(point), address, process])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_FLAGS": flags} if point.devices > 1 else None,
        )
        for process in range(point.processes)
    ]
    try:
        outputs = [process.communicate(timeout=seconds) for process in running]
    except subprocess.TimeoutExpired:
        return {"point": asdict(point), "failed": f"over {seconds:.0f} s"}
    finally:
        for process in running:
            process.kill()
    if any(process.returncode for process in running):
        # A process that was killed for its memory says nothing.
        said = [line for line in outputs[0][1].splitlines() if "Error" in line or "RESOURCE_EXHAUSTED" in line]
        return {"point": asdict(point), "failed": said[-1][:120] if said else f"exit status {running[0].returncode}"}
    return json.loads(outputs[0][0].splitlines()[-1])


def table(axis: str, rows: list[dict[str, Any]]) -> Table:
    view = Table(title=axis, title_justify="left")
    for column in ("", "s a round", "local exponent", "peak memory (MB)"):
        view.add_column(column, justify="right")
    for row in rows:
        if "failed" in row:
            view.add_row(row["label"], row["failed"], "", "")
        else:
            exponent = row.get("exponent")
            shown = "" if exponent is None else f"{exponent:.2f}"
            view.add_row(row["label"], f"{row['round_seconds']:.3g}", shown, f"{row['peak_host_bytes'] / 1e6:,.0f}")
    return view


def main(arguments: Arguments) -> None:
    if arguments.worker:
        worker(arguments.worker)
        return
    console = Console()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for axis in arguments.axes.split(","):
        found[axis] = rows = []
        for label, value, point in AXES[axis]:
            row = {"label": label, "value": value, **in_processes(point, arguments.seconds)}
            before = rows[-1] if rows else {}
            if before.get("value", value) < value and "round_seconds" in row and "round_seconds" in before:
                growth = math.log(row["round_seconds"] / before["round_seconds"])
                row["exponent"] = growth / math.log(value / before["value"])
            rows.append(row)
            arguments.out.write_text(json.dumps(found, indent=2) + "\n")
        console.print(table(axis, rows))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
