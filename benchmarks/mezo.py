"""Seconds and memory of a fine-tuning step with forward passes only, beside a plain MeZO step in PyTorch.

    pip install torch && python benchmarks/mezo.py

One device, no federation, central differences, one perturbation, OPT-125M's shape with random weights, batch 16 × 32
tokens, plain SGD, float32. The loss reads the last position and two columns of the vocabulary, in both. PyTorch's step
is that of the authors of MeZO (arXiv 2305.17333): the parameters perturbed in place, the directions drawn four times
from a seed. Every candidate is a process of its own; they take turns, and medians of all steps are compared.
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

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

SAMPLERS = ("gaussian", "rademacher", "binomial", "low_rank")
MU, RATE, WORDS = 1e-3, 1e-6, (205, 372)


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      batch: examples a step.
      tokens: tokens an example.
      steps: timed steps each time a candidate takes its turn.
      turns: how often each takes its turn.
      out: JSON file to write.
      worker: measure this candidate in this process.
    """

    batch: int = 16
    tokens: int = 32
    steps: int = 5
    turns: int = 3
    out: Path = Path("benchmarks/results/mezo.json")
    worker: str = ""


def data(arguments):
    rng = np.random.default_rng(0)
    shape = arguments.batch, arguments.tokens
    return rng.integers(0, 50272, shape, np.int32), rng.integers(0, 2, arguments.batch).astype(np.int32)


def of_jax(arguments, sampler):
    import jax
    import jax.numpy as jnp

    from hiso_jax import decomfl, zo
    from hiso_jax.models import lm
    from hiso_jax.tasks.text import text_shapes

    decoder = lm.Decoder(lm.SHAPES["opt-125m"])
    model = lm.tuned_shapes(decoder)
    task = text_shapes("sst2", model, max_length=arguments.tokens)
    tokens, labels = data(arguments)
    batch = {"tokens": tokens, "length": np.full(len(tokens), arguments.tokens, np.int32), "label": labels}
    batch = jax.tree.map(jnp.asarray, batch)
    tx = decomfl(RATE, sampler=sampler)
    settings: dict[str, Any] = {
        "num_perturbations": 1,
        "mu": MU,
        "difference": "central",
        "perturbed_as": task.perturbed_as,
    }
    step = zo.step(lambda p, b: task.loss(p, b).mean(), tx, **settings)
    run = jax.jit(step, donate_argnums=(0, 1))
    # The weights are made leaf by leaf, so that making them takes no more memory than they do.
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32)), model.trained)
    state = tx.init(params)
    times = []
    for number in range(arguments.steps + 1):
        begin = time.perf_counter()
        params, state, loss = jax.block_until_ready(run(params, state, batch, jax.random.key(number)))
        times.append(time.perf_counter() - begin)
    return times[1:], float(loss), (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def of_torch(arguments):
    import torch
    from transformers import OPTConfig, OPTModel

    torch.manual_seed(0)
    # On a GPU products are in TF32, as JAX's are by default.
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = OPTModel(OPTConfig()).eval().to(device)
    tokens, labels = (torch.tensor(array, dtype=torch.long, device=device) for array in data(arguments))
    parameters = list(model.parameters())

    def perturb(seed, scale):
        torch.manual_seed(seed)
        for p in parameters:
            p.add_(torch.normal(0.0, 1.0, p.shape, device=device), alpha=scale)

    def loss():
        last = model(input_ids=tokens, use_cache=False).last_hidden_state[:, -1]
        return torch.nn.functional.cross_entropy(last @ model.decoder.embed_tokens.weight[list(WORDS)].T, labels)

    times = []
    with torch.inference_mode():
        for seed in range(arguments.steps + 1):
            begin = time.perf_counter()
            perturb(seed, MU)
            above = loss()
            perturb(seed, -2 * MU)
            below = loss()
            perturb(seed, MU)
            slope = float(above - below) / (2 * MU)
            torch.manual_seed(seed)
            for p in parameters:
                p.sub_(torch.normal(0.0, 1.0, p.shape, device=device), alpha=RATE * slope)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    return times[1:], float(above), torch.cuda.max_memory_allocated() if device == "cuda" else None


def worker(arguments):
    times, loss, peak = of_torch(arguments) if arguments.worker == "torch" else of_jax(arguments, arguments.worker)
    # The peak is the device's, if the device has memory of its own.
    peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"times": times, "loss": loss, "peak_bytes": peak}


def main(arguments: Arguments) -> None:
    if arguments.worker:
        print(json.dumps(worker(arguments)))
        return
    numbers = {"batch": arguments.batch, "tokens": arguments.tokens, "steps": arguments.steps}
    options = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    found = {name: [] for name in ("torch", *SAMPLERS)}
    for _ in range(arguments.turns):
        for name, runs in found.items():
            command = [sys.executable, __file__, *options, "--worker", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    report = {}
    for name, runs in found.items():
        times = [seconds for run in runs for seconds in run["times"]]
        report[name] = {"seconds": median(times), "spread": [min(times), max(times)]}
        report[name]["peak_bytes"] = median(run["peak_bytes"] for run in runs)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"settings": numbers, "results": report}, indent=2) + "\n")
    table = Table(title="A step with forward passes only, OPT-125M's shape")
    for heading in ("", "s a step", "of PyTorch's", "peak GB", "of PyTorch's"):
        table.add_column(heading, justify="right")
    torch = report["torch"]
    for name, r in report.items():
        ratios = r["seconds"] / torch["seconds"], r["peak_bytes"] / torch["peak_bytes"]
        table.add_row(
            name, f"{r['seconds']:.3g}", f"{ratios[0]:.2f}", f"{r['peak_bytes'] / 1e9:.2f}", f"{ratios[1]:.2f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__.split("\n")[0]))
