"""Normals a second: JAX's own threefry beside the form in which hiso_jax draws, which gives the same bits.

    python benchmarks/normals.py

Flat is one leaf; layered is the same number in twelve layers, each with its own key, added to the weights that they
perturb. The draws are timed in turn in one process.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from hiso_jax import zo

LAYERS = 12


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      millions: how many million normals to draw.
      repeats: timed calls.
      out: JSON file to write.
    """

    millions: int = 48
    repeats: int = 7
    out: Path = Path("benchmarks/results/normals.json")


def own(key, shape, dtype):
    """JAX's own draw, flat, which compiles and runs fastest."""
    return jax.random.normal(key, (shape[0],), dtype)


def main(arguments: Arguments) -> None:
    size = arguments.millions * 10**6
    each = size // LAYERS

    def layered(draw):
        def run(key, weights):
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(LAYERS))
            return weights + 1e-3 * jax.vmap(lambda k: draw(k, (each,), jnp.float32))(keys)

        return run

    weights = jnp.zeros((LAYERS, each))
    flat = {name: (lambda key, weights, draw=draw: draw(key, (size,), jnp.float32)) for name, draw in DRAWS.items()}
    programs = {
        **{f"{name}, flat": jax.jit(run) for name, run in flat.items()},
        **{f"{name}, layered": jax.jit(layered(draw)) for name, draw in DRAWS.items()},
    }
    key, times = jax.random.key(0), {name: [] for name in programs}
    outputs = {name: jax.block_until_ready(run(key, weights)) for name, run in programs.items()}
    for form in ("flat", "layered"):
        assert jnp.array_equal(outputs[f"jax.random, {form}"], outputs[f"zo.gaussian, {form}"])
    del outputs
    for _ in range(arguments.repeats):
        for name, run in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run(key, weights))
            times[name].append(time.perf_counter() - begin)
    rates = {name: size / median(values) for name, values in times.items()}
    report = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "normals_per_second": rates}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    table = Table(title=f"{arguments.millions} million normals on {report['device']}")
    table.add_column("drawn by")
    table.add_column("million a second", justify="right")
    for name, rate in rates.items():
        table.add_row(name, f"{rate / 1e6:.0f}")
    Console().print(table)


DRAWS = {"jax.random": own, "zo.gaussian": zo.gaussian}

if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__.split("\n")[0]))
