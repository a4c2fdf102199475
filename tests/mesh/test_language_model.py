"""A language model over a mesh: directions kept, layers scanned, the frozen parameters split with the trained ones."""

import functools

import jax
import numpy as np
import pytest

import hiso_jax
from hiso_jax import fed
from hiso_jax.models.lm import Decoder, from_transformers
from hiso_jax.models.lm.checkpoint import Pretrained
from hiso_jax.models.lm.trainable import tune
from hiso_jax.tasks.text import TextChoice
from tests.fed.problems import assert_trees_identical
from tests.marks import slow
from tests.models.lm.checkpoints import LLAMA

CONFIG = {**LLAMA, "num_hidden_layers": 2, "vocab_size": 64}


@functools.cache
def task(trainable):
    decoder = Decoder(from_transformers(CONFIG))
    params = jax.tree.map(lambda x: np.asarray(3 * x), jax.jit(decoder.init)(jax.random.key(0)))
    rng = np.random.default_rng(0)
    data = {
        "tokens": rng.integers(0, 64, (24, 8), np.int32),
        "length": np.full(24, 8, np.int32),
        "label": rng.integers(0, 2, 24).astype(np.int32),
    }
    model = tune(Pretrained(decoder, params, None, "small"), trainable)
    return TextChoice(model=model, words=(5, 9), buckets=(8,), train=data, test=data, name="small")


def run(mesh, trainable):
    config = fed.SimulationConfig(
        rounds=3, cohort=5, perturbations=2, batch_size=4, eval_every=3, rounds_per_dispatch=3, directions="keep"
    )
    return fed.Simulation(task(trainable), hiso_jax.hiso(1e-3), fed.iid(24, 6), config, mesh=mesh).run()


@pytest.mark.parametrize("trainable", ["lora", slow("all")])
def test_a_sharded_run_of_a_language_model(mesh, trainable):
    result, alone = run(mesh, trainable), run(None, trainable)
    # If only clients are split, every device runs the unsharded program. If the model is split, the sums inside
    # attention and norms are taken in another order, as are those of the loss.
    ulps = 16 if mesh.shape["model"] > 1 else 8
    tolerance = ulps * 2**-23 * abs(float(alone.records.loss[0])) / 1e-3
    np.testing.assert_allclose(result.records.scalars[0], alone.records.scalars[0], atol=tolerance)
    assert np.abs(alone.records.scalars[0]).max() > 2 * tolerance
    rebuilt = fed.replay(result.initial_params, hiso_jax.hiso(1e-3), result.records)
    assert_trees_identical((result.params, result.state), rebuilt)
