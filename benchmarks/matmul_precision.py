"""The effect on scalars and on runs of rounding the operands of matrix products, as accelerators do by default.

    python benchmarks/matmul_precision.py --data-dir FOLDER_WITH_IDX_FILES

On TPU a product of float32 rounds its operands to bfloat16 by default, on GPUs to TF32 (10 bits of mantissa); sums are
float32 in both. Here both are emulated: the model is evaluated with every operand of every product and convolution
rounded so. The script measures the change of a round's scalars from those in float32, with the same parameters and in
rms of the scalars. It also measures the accuracy of whole runs, paired by seed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal
from rich.console import Console
from rich.table import Table

from hiso_jax import decomfl, fed, tasks

MANTISSA = {"float32": None, "tf32": 10, "bfloat16": 7}
PRODUCTS = ("dot_general", "conv_general_dilated")


def rounding(function: Callable[..., Any], mantissa: int | None) -> Callable[..., Any]:
    """``function``, the operands of its products rounded to so many bits of mantissa."""
    if mantissa is None:
        return function

    def run(*arguments: Any) -> Any:
        jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        return jax.tree.unflatten(jax.tree.structure(shape), _evaluate(jaxpr, mantissa, *jax.tree.leaves(arguments)))

    return run


def _evaluate(closed: ClosedJaxpr, mantissa: int, *arguments: Any) -> list[Any]:
    values: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= zip(closed.jaxpr.invars, arguments, strict=True)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in closed.jaxpr.eqns:
        given = [read(atom) for atom in equation.invars]
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        if equation.primitive.name in PRODUCTS:
            given = [lax.reduce_precision(x, 8, mantissa) for x in given]
        if equation.primitive.name in ("jit", "pjit", "custom_jvp_call") and inner is not None:
            made = _evaluate(inner, mantissa, *given)
        else:
            made = equation.primitive.bind(*given, **equation.params)
            made = made if equation.primitive.multiple_results else [made]
        values |= zip(equation.outvars, made, strict=True)
    return [read(atom) for atom in closed.jaxpr.outvars]


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      data_dir: folder with MNIST's IDX files.
      rounds: rounds of every run.
      seeds: number of seeds.
      rate: learning rate.
      out: JSON file to write.
    """

    data_dir: Path
    rounds: int = 400
    seeds: int = 3
    rate: float = 1e-3
    out: Path = Path("benchmarks/results/matmul_precision.json")


def scalars(task, params, population, mantissa):
    config = fed.SimulationConfig(rounds=1, cohort=8, eval_every=1, rounds_per_dispatch=1)
    own = replace(task, model_apply=rounding(task.model_apply, mantissa))
    starting = fed.task.HeldOut(own, own.train, {name: a[:10] for name, a in own.test.items()})
    object.__setattr__(starting, "init", lambda key: params)
    return fed.Simulation(starting, decomfl(1e-9), population, config).run().records.scalars[0]


def main(arguments: Arguments) -> None:
    task = tasks.mnist(arguments.data_dir)
    population = fed.dirichlet(task.train["label"], 64, alpha=1.0)
    accuracy = {name: [] for name in MANTISSA}
    moved = {name: [] for name in MANTISSA if name != "float32"}
    for seed in range(arguments.seeds):
        config = fed.SimulationConfig(rounds=arguments.rounds, cohort=8, eval_every=arguments.rounds, seed=seed)
        for name, mantissa in MANTISSA.items():
            own = replace(task, model_apply=rounding(task.model_apply, mantissa))
            result = fed.Simulation(own, decomfl(arguments.rate), population, config).run()
            accuracy[name].append(result.metrics[-1].metrics["accuracy"])
            if name == "float32":
                trained = result.params
        for params in (task.init(jax.random.key(seed)), trained):
            exact = scalars(task, params, population, None)
            for name in moved:
                other = scalars(task, params, population, MANTISSA[name])
                moved[name].append(float(np.sqrt(np.mean((other - exact) ** 2) / np.mean(exact**2))))
    report = {"settings": {k: str(v) for k, v in vars(arguments).items()}, "accuracy": accuracy, "moved": moved}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    table = Table(title="Operands of products rounded, MNIST's CNN")
    for heading in ("operands", "scalars moved, rms", f"accuracy at {arguments.rounds}", "of float32's, paired"):
        table.add_column(heading, justify="right")
    for name, reached in accuracy.items():
        shift = f"{100 * np.mean(moved[name]):.1f} %" if name in moved else ""
        paired = np.array(reached) - np.array(accuracy["float32"])
        table.add_row(name, shift, f"{np.mean(reached):.3f}", f"{np.mean(paired):+.3f} ± {np.std(paired):.3f}")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__.split("\n")[0]))
