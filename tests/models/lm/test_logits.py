"""Logits, compared with transformers' torch models: always with stored ones, and with live ones if torch is there."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiso_jax.models.lm.checkpoint import read_config, read_safetensors
from hiso_jax.models.lm.decoder import Decoder
from tests.models.lm.checkpoints import CONFIGS, inputs, torch_logits, write

GOLDEN = np.load(Path(__file__).with_name("golden_logits.npz"))


def our_logits(folder, side):
    config = read_config(folder)
    decoder, params = Decoder(config), read_safetensors(folder, config)
    tokens, mask = inputs(side)
    run = jax.jit(lambda params, tokens, mask: decoder.logits(params, decoder.hidden(params, tokens, mask)))
    return np.asarray(run(params, jnp.asarray(tokens), jnp.asarray(mask)))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_golden_ones(name, tmp_path):
    folder = write(tmp_path, CONFIGS[name])
    for side in ("left", "right"):
        ours = our_logits(folder, side)[inputs(side)[1]][:, ::7]
        np.testing.assert_allclose(ours, GOLDEN[f"{name} {side}"], atol=1e-5, rtol=0)
        assert np.ptp(ours) > 0.5


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_torch(name, tmp_path):
    folder = write(tmp_path, CONFIGS[name])
    for side in ("left", "right"):
        mask = inputs(side)[1]
        np.testing.assert_allclose(our_logits(folder, side)[mask], torch_logits(folder, side)[mask], atol=1e-5, rtol=0)
