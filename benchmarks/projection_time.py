"""Seconds to project a client's progress on P directions, and to rebuild Δ: by family of directions and model.

    python benchmarks/projection_time.py
    python benchmarks/projection_time.py --shapes mnist,opt-125m-lora,opt-125m --counts 64,128

One client has directions of its own, as a client's machine would compute them; the gradient is not included. Families
are timed in turn in one process, and medians are reported. Weights are zeros: time does not depend on them.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from hiso_jax import models, zo
from hiso_jax.models import lm


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      shapes: any of mnist, opt-125m-lora, opt-125m; comma-separated.
      counts: values of P, comma-separated.
      samplers: families, comma-separated.
      repeats: timed calls of each.
      dear: seconds of one call above which it is timed once.
      out: JSON file to write.
    """

    shapes: str = "mnist,opt-125m-lora"
    counts: str = "64,128,512"
    samplers: str = "gaussian,rademacher,hadamard"
    repeats: int = 5
    dear: float = 10.0
    out: Path = Path("benchmarks/results/projection_time.json")


def shapes_of(name: str) -> Any:
    """The shapes of the trained parameters."""
    if name == "mnist":
        return jax.eval_shape(models.cnn(side=28, kernel=5, features=(16, 32)).init, jax.random.key(0))
    lora = name.endswith("-lora")
    decoder = lm.Decoder(lm.SHAPES[name.removesuffix("-lora")])
    adapters = lm.Adapters(8, 16.0, ("q_proj", "v_proj")) if lora else lm.Adapters()
    return lm.tuned_shapes(decoder, "lora" if lora else "all", adapters=adapters).trained


def programs(params: Any, count: int, directions: zo.Directions) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The functions (key, vectors) → scalars and (key, scalars) → Δ."""

    def project(key: Any, vector: Any) -> Any:
        made = zo.grouped_directions(directions, key, 0, params, None, 1, count)
        return made.inner(vector, jnp.zeros(1, jnp.int32))

    return jax.jit(project), jax.jit(lambda key, scalars: zo.accumulate(key, scalars, params, sampler=directions))


def seconds(call: Callable[[], Any], arguments: Arguments) -> float:
    """The median time of a call of a compiled function."""
    jax.block_until_ready(call())
    times: list[float] = []
    while len(times) < arguments.repeats:
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
        if times[-1] > arguments.dear:
            break
    return median(times)


def main(arguments: Arguments) -> None:
    """Measure, print a table and write JSON."""
    rows, console = [], Console()
    for shape in arguments.shapes.split(","):
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes_of(shape))
        vector = jax.tree.map(lambda x: jnp.ones((1, *x.shape), zo.working_dtype(x)), params)
        for count in map(int, arguments.counts.split(",")):
            for sampler in arguments.samplers.split(","):
                project, rebuild = programs(params, count, zo.as_directions(sampler))
                key, scalars = jax.random.key(0), jnp.ones(count)
                row = {
                    "shape": shape,
                    "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
                    "perturbations": count,
                    "sampler": sampler,
                    "project_seconds": seconds(lambda: project(key, vector), arguments),  # noqa: B023
                    "rebuild_seconds": seconds(lambda: rebuild(key, scalars), arguments),  # noqa: B023
                }
                rows.append(row)
                console.print(row)
                settings = {name: str(value) for name, value in asdict(arguments).items()}
                device = {"device": jax.default_backend(), "jax": jax.__version__}
                arguments.out.write_text(json.dumps({"settings": settings, **device, "rows": rows}, indent=1) + "\n")
    table = Table("shape", "P", "family", "project, ms", "rebuild, ms")
    for row in rows:
        times = [f"{1e3 * row[name]:,.2f}" for name in ("project_seconds", "rebuild_seconds")]
        table.add_row(row["shape"], str(row["perturbations"]), row["sampler"], *times)
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__.split("\n")[0]))
