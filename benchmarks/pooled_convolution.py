"""The gain of the first layer's layout: rounds with PooledConv beside rounds with plain convolutions, in turn.

    python benchmarks/pooled_convolution.py

Random bytes of MNIST's shape; one process; HiSo, P = 5, batch 32; the ratio is that of the median round times.
"""

import json
import time
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

import hiso_jax
from hiso_jax import models
from hiso_jax.models.vision import CNN

SETTINGS = [(1, 8), (1, 64), (5, 8)]
REPEATS = 7


class PlainCNN(CNN):
    """The same network and parameters, its first layer a convolution and a pool."""

    def __init__(self, *arguments, rngs):
        super().__init__(*arguments, rngs=rngs)
        self.conv1 = nnx.Conv(1, 16, (5, 5), rngs=rngs)  # type: ignore[assignment]

    def __call__(self, images):
        x = nnx.relu(nnx.max_pool(self.conv1(images), (2, 2), (2, 2)))
        x = nnx.relu(nnx.max_pool(self.conv2(x), (2, 2), (2, 2)))
        return self.output(x.reshape(x.shape[0], -1))


def build(model, steps):
    def loss(params, batch):
        images, labels = batch
        logits = model.apply(params, images.astype(jnp.float32) / 255)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    settings = {"local_steps": steps, "num_perturbations": 5, "mu": 1e-3, "local_learning_rate": 1e-3}
    return jax.jit(hiso_jax.make_round(loss, hiso_jax.hiso(1e-3), **settings))


def main() -> None:
    layouts = {
        "pooled": models.cnn(side=28, kernel=5, features=(16, 32)),
        "plain": models.functional(lambda rngs: PlainCNN(28, 5, (16, 32), 10, rngs=rngs)),
    }
    view = Table(title="rounds/s by the layout of the first layer", title_justify="left")
    for column in ("K", "cohort", "pooled", "plain", "ratio"):
        view.add_column(column, justify="right")
    rows = []
    for steps, cohort in SETTINGS:
        rng = np.random.default_rng(0)
        images = jnp.asarray(rng.integers(0, 256, (cohort, steps, 32, 28, 28, 1), np.uint8))
        labels = jnp.asarray(rng.integers(0, 10, (cohort, steps, 32)))
        params = layouts["pooled"].init(jax.random.key(0))
        state, mask, key = hiso_jax.hiso(1e-3).init(params), jnp.ones(cohort, bool), jax.random.key(1)
        inputs = (params, state, (images, labels), mask, key)
        rounds = {name: build(model, steps) for name, model in layouts.items()}
        scalars = [jax.block_until_ready(run(*inputs))[2].scalars for run in rounds.values()]
        np.testing.assert_allclose(*scalars, atol=8 * 2**-23 * 2.5 / 1e-3 * 5)
        times = {name: [] for name in rounds}
        for _ in range(REPEATS):
            for name, run in rounds.items():
                begin = time.perf_counter()
                jax.block_until_ready(run(*inputs))
                times[name].append(time.perf_counter() - begin)
        seconds = {name: median(values) for name, values in times.items()}
        rows.append({"local_steps": steps, "cohort": cohort, "seconds": seconds})
        ratio = seconds["plain"] / seconds["pooled"]
        figures = (f"{1 / seconds['pooled']:.3g}", f"{1 / seconds['plain']:.3g}", f"{ratio:.2f}")
        view.add_row(str(steps), str(cohort), *figures)
    Path("benchmarks/results/pooled_convolution.json").write_text(json.dumps(rows, indent=2) + "\n")
    Console().print(view)


if __name__ == "__main__":
    main()
