"""Seconds a round, the parts of this time, floor ratio and peak memory of fine-tuning a language model.

    python benchmarks/llm_round.py                                              # OPT-125M's shape, float32
    python benchmarks/llm_round.py --shape opt-1.3b --dtype bfloat16            # on a GPU
    python benchmarks/llm_round.py --shape llama-7b --dtype bfloat16 --curvature-dtype bfloat16 --modes regenerate

Weights are random: time and memory do not depend on them. The loss reads the last position and two columns of the
vocabulary. The floor ratio is the median round over (forward evaluations per client) × the median evaluation of the
same loss over the whole cohort as one flat batch. Rounds of both modes and the evaluation are timed in turn in one
process; peak memory is taken in processes of their own, which run rounds of one mode only.
"""

import json
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from hiso_jax import algorithms, fed, hiso, zo
from hiso_jax.models import lm
from hiso_jax.models.lm import Decoder, Tuned
from hiso_jax.tasks.text import TextChoice

SHAPES = {
    **lm.SHAPES,
    "tiny": replace(
        lm.SHAPES["opt-125m"],
        vocab_size=512,
        hidden_size=64,
        embedding_size=64,
        layers=2,
        heads=4,
        kv_heads=4,
        head_dim=16,
        mlp_size=128,
    ),
}
MODES: tuple[zo.DirectionsMode, ...] = ("keep", "regenerate")


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      shape: tiny, or an architecture of hiso_jax.models.lm.SHAPES.
      dtype: dtype in which the model computes.
      param_dtype: dtype of its parameters; by default the one in which it computes.
      curvature_dtype: dtype of the curvature.
      clients: clients in the cohort.
      batch: examples per client and local step.
      tokens: tokens per example.
      perturbations: P.
      local_steps: K; above 1 only regenerate exists.
      repeats: timed rounds per mode.
      modes: keep, regenerate, comma-separated.
      algorithm: hiso, or decomfl, whose directions are not shaped by a curvature.
      sampler: family of directions.
      groups: groups of the cohort, each with directions of its own; above 1 the cohort in one group is timed beside it.
      out: JSON file to write; by default named after the shape.
      worker: measure in this process: "time", or "memory" and a mode.
    """

    shape: str = "opt-125m"
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] | None = None
    curvature_dtype: Literal["float32", "bfloat16"] = "float32"
    clients: int = 2
    batch: int = 16
    tokens: int = 32
    perturbations: int = 5
    local_steps: int = 1
    repeats: int = 5
    modes: str = "keep,regenerate"
    algorithm: Literal["hiso", "decomfl"] = "hiso"
    sampler: Literal["gaussian", "rademacher", "binomial", "hadamard", "low_rank", "low_rank_4"] = "gaussian"
    groups: int = 1
    out: Path | None = None
    worker: str = ""


def build(arguments):
    """The task, its parameters on the device, and one cohort's batches."""
    config = SHAPES[arguments.shape]
    decoder = Decoder(config, jnp.dtype(arguments.dtype))
    kept = jnp.dtype(arguments.param_dtype or arguments.dtype)

    def init(key):
        return jax.tree.map(lambda x: x.astype(kept), decoder.init(key))

    rng = np.random.default_rng(0)
    rows = arguments.clients * arguments.local_steps * arguments.batch
    data = {
        "tokens": rng.integers(0, config.vocab_size, (rows, arguments.tokens), np.int32),
        "length": np.full(rows, arguments.tokens, np.int32),
        "label": rng.integers(0, 2, rows).astype(np.int32),
    }
    params = jax.jit(init)(jax.random.key(0))
    task = TextChoice(
        model=Tuned(decoder, None, None),
        words=(205, 372),
        buckets=(arguments.tokens,),
        train=data,
        test=data,
        name=arguments.shape,
    )
    shape = (arguments.clients, arguments.local_steps, arguments.batch)
    return task, params, {name: jnp.asarray(a.reshape(*shape, *a.shape[1:])) for name, a in data.items()}


def make_round(arguments, task, mode, groups):
    """One round in one program: ``(params, state, batches, key) → (params, state, loss)``, its state donated."""
    tx = zo.grouped(zo_optimizer(arguments), groups=groups)
    run = fed.make_round(
        task.loss,
        tx,
        local_steps=arguments.local_steps,
        num_perturbations=arguments.perturbations,
        mu=1e-3,
        local_learning_rate=1e-6,
        execution=fed.ExecutionSettings(directions=mode, perturbed_as=task.perturbed_as),
    )
    mask = jnp.ones(arguments.clients, bool)

    def whole(params, state, batches, key):
        params, state, record = run(params, state, batches, mask, key)
        return params, state, record.loss

    return tx, jax.jit(whole, donate_argnums=(0, 1))


def zo_optimizer(arguments):
    if arguments.algorithm == "decomfl":
        return algorithms.decomfl(1e-6, sampler=arguments.sampler).tx
    return hiso(1e-6, curvature_dtype=jnp.dtype(arguments.curvature_dtype), sampler=arguments.sampler)


def seconds(call, *inputs):
    begin = time.perf_counter()
    output = jax.block_until_ready(call(*inputs))
    return time.perf_counter() - begin, output


def measure_time(arguments):
    task, params, batches = build(arguments)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    modes = [mode for mode in arguments.modes.split(",") if mode == "regenerate" or arguments.local_steps == 1]
    flat = {name: a[:, 0].reshape(-1, *a.shape[3:]) for name, a in batches.items()}
    forward = jax.jit(lambda params, batch: task.loss(params, batch).mean())

    def generate(params, curvature, key):
        # The program writes the direction to memory, as one that uses it does; one direction at a time.
        directions = zo.as_directions(arguments.sampler)
        made = zo.grouped_directions(directions, key, 0, params, curvature, 1, arguments.perturbations)
        return made.at(0).of(0)

    tx = zo_optimizer(arguments)
    state = jax.jit(tx.init)(params)
    direction = jax.jit(generate)
    rounds, compile_seconds = {}, {}
    keys = [jax.random.fold_in(jax.random.key(1), i) for i in range(arguments.repeats + 1)]
    asked = modes
    modes = modes + [f"{mode}, one group" for mode in modes if arguments.groups > 1]
    for mode in modes:
        groups = arguments.groups if mode in asked else 1
        _, run = make_round(arguments, task, mode.partition(",")[0], groups)
        begin = time.perf_counter()
        rounds[mode] = run.lower(params, state, batches, keys[0]).compile()
        compile_seconds[mode] = time.perf_counter() - begin
        params, state, _ = jax.block_until_ready(rounds[mode](params, state, batches, keys[0]))
    jax.block_until_ready(forward(params, flat))
    jax.block_until_ready(direction(params, zo.zo_state(state).curvature, keys[0]))
    times = {name: [] for name in ("forward", "direction", *modes)}
    for key in keys[1:]:
        times["forward"].append(seconds(forward, params, flat)[0])
        elapsed, z = seconds(direction, params, zo.zo_state(state).curvature, key)
        times["direction"].append(elapsed)
        del z
        for mode in modes:
            elapsed, (params, state, _) = seconds(rounds[mode], params, state, batches, key)
            times[mode].append(elapsed)
    medians = {name: median(values) for name, values in times.items()}
    evaluations = arguments.local_steps * (arguments.perturbations + 1)
    floor = evaluations * medians["forward"]
    tokens = arguments.clients * arguments.batch * arguments.tokens
    results = []
    for mode in modes:
        made = arguments.local_steps * arguments.perturbations * (1 if mode.startswith("keep") else 2)
        generation = made * medians["direction"]
        results.append(
            {
                "mode": mode,
                "seconds": medians[mode],
                "spread": [min(times[mode]), max(times[mode])],
                "floor_ratio": medians[mode] / floor,
                "forward_seconds": floor,
                "generation_seconds": generation,
                "rest_seconds": medians[mode] - floor - generation,
                "tokens_per_second": tokens * evaluations / medians[mode],
                "compile_seconds": compile_seconds[mode],
            }
        )
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    return {**device, "parameters": count, "normals_per_second": count / medians["direction"], "modes": results}


def measure_memory(arguments, mode):
    task, params, batches = build(arguments)
    tx, run = make_round(arguments, task, mode.partition(",")[0], 1 if "," in mode else arguments.groups)
    state = jax.jit(tx.init)(params)
    for number in range(2):
        params, state, loss = jax.block_until_ready(run(params, state, batches, jax.random.key(number)))
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_bytes": peak, "loss": float(loss)}


def worker(arguments, task):
    settings = [
        item
        for name in ("shape", "dtype", "param_dtype", "curvature_dtype", "clients", "batch", "tokens", "perturbations",
                     "local_steps", "repeats", "modes", "algorithm", "sampler", "groups")
        if (value := getattr(arguments, name)) is not None
        for item in (f"--{name.replace('_', '-')}", str(value))
    ]  # fmt: skip
    command = [sys.executable, __file__, *settings, "--worker", task]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Arguments) -> None:
    if arguments.worker:
        task, _, mode = arguments.worker.partition(" ")
        print(json.dumps(measure_time(arguments) if task == "time" else measure_memory(arguments, mode)))
        return
    # This process never touches the device, whose memory the workers need.
    timed = worker(arguments, "time")
    if "error" in timed:
        raise SystemExit(timed["error"])
    with ThreadPoolExecutor() as side_by_side:
        taken = side_by_side.map(lambda result: worker(arguments, f"memory {result['mode']}"), timed["modes"])
        for result, memory in zip(timed["modes"], list(taken), strict=True):
            result |= memory
    settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "worker")}
    report = {"settings": settings, **timed}
    kind = f"{arguments.algorithm}_" if arguments.algorithm != "hiso" else ""
    kind += arguments.sampler + (f"_g{arguments.groups}" if arguments.groups > 1 else "")
    kind += f"_p{arguments.perturbations}" if arguments.perturbations != 5 else ""
    out = arguments.out or Path(f"benchmarks/results/llm_round_{arguments.shape}_k{arguments.local_steps}_{kind}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    table = Table(title=f"{arguments.shape}: {timed['parameters'] / 1e6:.0f} million parameters on {timed['device']}")
    for heading in ("directions", "s/round", "floor ratio", "forward", "generation", "rest", "tokens/s", "peak GB"):
        table.add_column(heading, justify="right")
    for r in timed["modes"]:
        figures = [r[k] for k in ("seconds", "floor_ratio", "forward_seconds", "generation_seconds", "rest_seconds")]
        peak = f"{r['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in r else r["error"][:40]
        table.add_row(r["mode"], *(f"{x:.3g}" for x in figures), f"{r['tokens_per_second']:.0f}", peak)
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__.split("\n")[0]))
