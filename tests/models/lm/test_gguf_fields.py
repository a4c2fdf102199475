"""Every field of a GGUF file is read, neutral, or refused by its name."""

import jax.numpy as jnp
import numpy as np
import pytest

from hiso_jax.models import lm
from hiso_jax.models.lm import gguf as gguf_files
from hiso_jax.models.lm.gguf import open_gguf
from tests.models.lm.checkpoints import weights
from tests.models.lm.reading import logits, plain_angles, yarn_angles
from tests.models.lm.test_loading import WIDE, identical, write_gguf

TOKENS = np.arange(20, dtype=np.int32) % 26
WIDTH = 64
YARN = [("llama.rope.scaling.type", "yarn"), ("llama.rope.scaling.factor", 4.0)]
YARN16 = [*YARN, ("llama.rope.scaling.original_context_length", 16)]
STRETCHED = 0.1 * np.log(4.0) + 1


def yarn(**changes):
    return yarn_angles(WIDTH, **{"factor": 4, "original": 16, **changes})


@pytest.mark.parametrize(
    ("fields", "angles", "scale"),
    [
        ([], plain_angles(WIDTH), 1),
        ([("llama.rope.scaling.factor", 4.0)], plain_angles(WIDTH) / 4, 1),
        ([("llama.rope.scale_linear", 4.0)], plain_angles(WIDTH) / 4, 1),
        ([("llama.rope.scaling.type", "none"), ("llama.rope.scaling.factor", 4.0)], plain_angles(WIDTH), 1),
        ([("llama.rope.scaling.type", "linear"), ("llama.rope.scaling.factor", 0.0)], plain_angles(WIDTH), 1),
        (YARN16, yarn(), STRETCHED),
        (YARN, yarn(original=64), STRETCHED),
        ([*YARN16, ("llama.rope.scaling.attn_factor", 0.8)], yarn(), 0.8 * STRETCHED),
        ([*YARN16, ("llama.rope.scaling.yarn_attn_factor", 0.9)], yarn(), 0.9),
        (
            [*YARN16, ("llama.rope.scaling.yarn_attn_factor", 1.0), ("llama.rope.scaling.yarn_ext_factor", -1.0)],
            yarn(),
            STRETCHED,
        ),
        (
            [*YARN16, ("llama.rope.scaling.yarn_beta_fast", 8.0), ("llama.rope.scaling.yarn_beta_slow", 2.0)],
            yarn(fast=8, slow=2),
            STRETCHED,
        ),
    ],
)
def test_positions_turn_as_the_fields_say(fields, angles, scale, tmp_path):
    loaded = lm.load(write_gguf(tmp_path / "m.gguf", fields=fields))
    decoder, params = loaded.decoder, loaded.params
    ours = np.asarray(decoder.logits(params, decoder.hidden(params, jnp.asarray(TOKENS[None]))))[0]
    expected = logits(weights(WIDE), WIDE, TOKENS, angles=angles, scale=scale)
    np.testing.assert_allclose(ours, expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("llama.logit_scale", 0.5),
        ("llama.expert_count", 8),
        ("llama.attention.causal", False),
        ("llama.attention.sliding_window", 16),
        ("llama.rope.dimension_count", 32),
        ("llama.attn_logit_softcapping", 20.0),
        ("llama.a_new_thing", 3),
        ("llama.rope.scaling.attn_factor", 0.8),
        ("general.type", "adapter"),
    ],
)
def test_a_field_that_is_not_known_and_says_something_is_refused_by_name(field, value, tmp_path):
    with pytest.raises(ValueError, match=field.removeprefix("llama.").removeprefix("general.")):
        open_gguf(write_gguf(tmp_path / "m.gguf", fields=[(field, value)]))


def test_the_defaults_that_llama_cpp_writes_mean_nothing(tmp_path):
    fields = [
        ("llama.attn_logit_softcapping", 50.0),
        ("llama.final_logit_softcapping", 30.0),
        ("llama.logit_scale", 0.0),
        ("llama.expert_count", 0),
        ("llama.attention.causal", True),
        ("llama.rope.dimension_count", WIDTH),
        ("llama.attention.sliding_window", 4096),
        ("llama.use_parallel_residual", False),
        ("llama.vocab_size", 1),
    ]
    plain, full = write_gguf(tmp_path / "a.gguf"), write_gguf(tmp_path / "b.gguf", fields=fields)
    assert open_gguf(plain)[0] == open_gguf(full)[0]


def test_a_model_in_parts_is_read_from_its_first(tmp_path):
    import gguf

    whole = write_gguf(tmp_path / "whole.gguf")
    reader = gguf.GGUFReader(whole)
    half = len(reader.tensors) // 2
    for number, part in enumerate((reader.tensors[:half], reader.tensors[half:]), 1):
        writer = gguf.GGUFWriter(tmp_path / f"m-{number:05}-of-00002.gguf", "llama")
        if number == 1:
            # All the metadata are in the first part.
            for name, field in reader.fields.items():
                if name.startswith(("llama.", "tokenizer.")):
                    kind = field.types[0]
                    writer.add_key_value(name, field.contents(), kind, *field.types[1:])
        writer.add_uint16("split.count", 2)
        for tensor in part:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    identical(lm.load(tmp_path / "m-00001-of-00002.gguf").params, lm.load(whole).params)
    with pytest.raises(ValueError, match="must be the first part of a GGUF file in 2 parts"):
        lm.load((tmp_path / "m-00001-of-00002.gguf").rename(tmp_path / "renamed.gguf"))


def test_a_token_longer_than_any_piece_is_refused_before_it_is_split():
    """The conversion tries every split of every token: a token of a million characters would take minutes."""
    fields = {"tokenizer.ggml.scores": [0.0, -1.0, -2.0]}
    with pytest.raises(ValueError, match="its longest has 1,000,001"):
        gguf_files._sentencepiece(fields, ["<unk>", "a", "b" + "a" * 1_000_000])
    # The total length is bounded, too: here many tokens are just short enough.
    many = [f"{number:05}" + "a" * 1000 for number in range(300)]
    with pytest.raises(ValueError, match="all of them together have"):
        gguf_files._sentencepiece({"tokenizer.ggml.scores": [0.0] * 300}, many)


def test_merges_that_make_no_token_of_the_vocabulary_are_one_sentence(tmp_path):
    fields = {"tokenizer.ggml.merges": ["a b", "x y"], "tokenizer.ggml.model": "gpt2"}
    with pytest.raises(ValueError, match="a vocabulary that fits its merges; that of m does not"):
        gguf_files._tokenizer({**fields, "tokenizer.ggml.tokens": ["a", "b", "ab"]}, "m")
