"""Every entry of a configuration is read, neutral, or refused by its name: sliding layers, rotary embeddings, kinds."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiso_jax.models import lm
from hiso_jax.models.lm.checkpoint import read_config, read_safetensors
from hiso_jax.models.lm.config import from_transformers
from hiso_jax.models.lm.decoder import Decoder
from tests.models.lm.checkpoints import CONFIGS, LLAMA, rope, weights, write
from tests.models.lm.reading import head_width, logits, plain_angles, yarn_angles

TOKENS = np.random.default_rng(2).integers(0, 61, 24).astype(np.int32)
FULL, SLIDING = "full_attention", "sliding_attention"


def ours(folder):
    config = read_config(folder)
    decoder, params = Decoder(config), read_safetensors(folder, config)
    return np.asarray(decoder.logits(params, decoder.hidden(params, jnp.asarray(TOKENS[None]))))[0]


QWEN = {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 4}
MINISTRAL = {**MISTRAL, "model_type": "ministral", "head_dim": 8}


@pytest.mark.parametrize(
    ("config", "slides"),
    [
        (QWEN, [False, True, True]),
        ({**QWEN, "layer_types": [SLIDING, FULL, SLIDING]}, [True, False, True]),
        ({**QWEN, "use_sliding_window": False}, [False] * 3),
        ({**MISTRAL, "layer_types": [FULL, SLIDING, "attention"]}, [False, True, False]),
        ({**MISTRAL, "layer_types": None}, [True] * 3),
        ({**MINISTRAL, "layer_types": [SLIDING, FULL, FULL]}, [True, False, False]),
        ({**MISTRAL, "sliding_window": None}, [False] * 3),
    ],
)  # fmt: skip
def test_layers_slide_as_layer_types_says(config, slides, tmp_path):
    tensors = weights(config)
    if config["model_type"] == "ministral":
        tensors = weights({**config, "model_type": "mistral"})
    expected = logits(tensors, config, TOKENS, windows=[4 if each else np.inf for each in slides])
    np.testing.assert_allclose(ours(write(tmp_path, config, tensors)), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("given", "angles", "scale"),
    [
        ({"factor": 4.0, "original_max_position_embeddings": 16}, {"factor": 4, "original": 16}, None),
        # The factor is 64 positions over 16.
        ({"factor": None, "original_max_position_embeddings": 16}, {"factor": 4, "original": 16}, None),
        ({"factor": 4.0, "truncate": None}, {"factor": 4, "original": 64, "truncate": False}, None),
        (
            {"factor": 4.0, "beta_fast": 8.0, "beta_slow": 2.0},
            {"factor": 4, "original": 64, "fast": 8, "slow": 2},
            None,
        ),
        ({"factor": 4.0, "attention_factor": 0.7}, {"factor": 4, "original": 64}, 0.7),
    ],
)
def test_yarn_stretches_as_its_configuration_says(given, angles, scale, tmp_path):
    config = rope("yarn", **given)
    tensors, width = weights(config), head_width(config)
    scale = 0.1 * np.log(4) + 1 if scale is None else scale
    expected = logits(tensors, config, TOKENS, angles=yarn_angles(width, **angles), scale=scale)
    np.testing.assert_allclose(ours(write(tmp_path, config, tensors)), expected, atol=2e-5)


def test_the_model_s_original_context_goes_before_that_of_its_embeddings(tmp_path):
    config = {**rope("yarn", factor=4.0, original_max_position_embeddings=64), "original_max_position_embeddings": 16}
    expected = logits(weights(config), config, TOKENS, angles=yarn_angles(8, 4, 16), scale=0.1 * np.log(4) + 1)
    np.testing.assert_allclose(ours(write(tmp_path, config)), expected, atol=2e-5)


def test_biases_are_those_that_the_family_has(tmp_path):
    """A Mistral model has no biases; a configuration that asks for them is refused."""
    with pytest.raises(ValueError, match="an entry attention_bias of True"):
        read_config(write(tmp_path / "a", {**MISTRAL, "attention_bias": True}))
    assert not read_config(write(tmp_path / "b", {**MISTRAL, "attention_bias": False})).qkv_bias


@pytest.mark.parametrize(
    ("family", "entry", "value"),
    [
        ("llama", "logit_scale", 0.5),
        ("llama", "is_causal", False),
        ("llama", "sliding_window", 4096),
        ("llama", "attention_multiplier", 0.1),
        ("llama", "some_new_thing", 3),
        ("llama", "query_pre_attn_scalar", 16),
        ("qwen2", "use_qk_norm", True),
        ("qwen3", "use_qk_norm", False),
        ("qwen3", "mlp_bias", True),
        ("smollm3", "query_pre_attn_scalar", 16),
        ("opt", "layer_norm_eps", 1e-6),
    ],
)
def test_an_entry_that_is_not_known_and_says_something_is_refused_by_name(family, entry, value, tmp_path):
    with pytest.raises(ValueError, match=f"that of {family} has an entry {entry} of"):
        read_config(write(tmp_path, {**CONFIGS[family], entry: value}))


@pytest.mark.parametrize(
    ("entries", "rotated"),
    [
        ({}, (True, False, True)),
        ({"no_rope_layer_interval": 3}, (True, True, False)),
        ({"no_rope_layer_interval": 4}, None),
        ({"no_rope_layers": [0, 1, 1]}, (False, True, True)),
        ({"no_rope_layers": [1, 1, 1]}, None),
    ],
)
def test_smollm3_says_which_layers_rotate(entries, rotated, tmp_path):
    assert read_config(write(tmp_path, {**CONFIGS["smollm3"], **entries})).rotated == rotated


@pytest.mark.parametrize(
    "entries", [{"no_rope_layers": [1, 0]}, {"no_rope_layers": [1, 2, 1]}, {"no_rope_layer_interval": 0}]
)
def test_layers_that_cannot_rotate_so_are_refused(entries):
    with pytest.raises(ValueError, match="no_rope_layer"):
        from_transformers({**CONFIGS["smollm3"], **entries})


@pytest.mark.parametrize(
    "entries",
    [
        {"some_new_thing": None, "another": 0, "list": [], "flag": False, "text": ""},
        {"pretraining_tp": 2, "torch_dtype": "bfloat16", "bos_token_id": 1, "_name_or_path": "x", "auto_map": {}},
        {"query_pre_attn_scalar": 8, "kv_channels": 8, "no_rope_layers": [1, 1, 1], "logit_scale": 1.0},
        {"rope_interleaved": False, "is_llama_config": True, "transformers.js_config": {"dtype": "q4"}},
    ],
)
def test_an_entry_that_says_nothing_is_taken(entries, tmp_path):
    assert read_config(write(tmp_path / "a", {**LLAMA, **entries})) == read_config(write(tmp_path / "b", LLAMA))


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 2.0, "short_factor": [1.0]}, "short_factor"),
        ({"rope_type": "yarn", "factor": 2.0, "mrope_section": [1, 2]}, "mrope_section"),
        ({"full_attention": {"rope_type": "default"}}, "in all layers|rope"),
    ],
)
def test_rotary_embeddings_that_are_not_known_are_refused_by_name(scaling, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        read_config(write(tmp_path, {**LLAMA, "rope_parameters": {"rope_theta": 1e4, **scaling}}))


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, {}, "not quantised.* gptq"),
        ({"quantization_config": {"quant_method": "fp8"}}, {}, "not quantised.* fp8"),
        ({}, {"model.layers.0.mlp.up_proj.qweight": np.zeros((4, 32), np.int32)}, "of GPTQ or AWQ"),
        ({}, {"model.layers.0.mlp.up_proj.weight.absmax": np.ones(4, np.float32)}, "of bitsandbytes"),
        ({}, {"model.layers.0.mlp.up_proj.weight": np.zeros((48, 32), np.int8)}, "up_proj.weight in I8"),
        ({}, {"model.norm.weight": np.full(32, np.nan, np.float32)}, "norm.weight has numbers that are not finite"),
    ],
)
def test_a_checkpoint_of_another_kind_is_named_for_what_it_is(config, tensors, said, tmp_path):
    folder = write(tmp_path, {**LLAMA, **config}, {**weights(LLAMA), **tensors})
    with pytest.raises(ValueError, match=said):
        read_safetensors(folder, read_config(folder))


def test_an_adapter_is_named_and_what_stands_beside_a_checkpoint_does_not_matter(tmp_path):
    from safetensors.numpy import save_file

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "meta/base"}))
    with pytest.raises(ValueError, match="is an adapter of PEFT for meta/base: merge"):
        lm.load(adapter)
    folder = write(tmp_path / "a", LLAMA)
    save_file({"tok_embeddings.weight": np.ones((61, 32), np.float32)}, folder / "consolidated.safetensors")
    before = read_safetensors(folder, read_config(folder))
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    jax.tree.map(np.testing.assert_array_equal, read_safetensors(folder, read_config(folder)), before)


def test_tensors_of_types_that_the_gguf_package_dequantises_are_read():
    import gguf

    from hiso_jax.models.lm.gguf import GGUFTensors

    def tensors(kind):
        own = types.SimpleNamespace(name="x", tensor_type=gguf.GGMLQuantizationType[kind], shape=[32])
        return [types.SimpleNamespace(tensors=[own])]

    for kind in ("Q5_0", "Q3_K", "IQ4_NL", "MXFP4", "BF16"):
        GGUFTensors(tensors(kind), {})
    for kind in ("I32", "Q8_K"):
        with pytest.raises(ValueError, match=f"x is {kind}"):
            GGUFTensors(tensors(kind), {})


def test_plain_angles_are_those_of_an_independent_formula():
    np.testing.assert_allclose(plain_angles(8), [1, 0.1, 0.01, 0.001], rtol=1e-12)
