"""Exported models equal the loaded models, in every architecture and from every format."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from hiso_jax.models import lm
from hiso_jax.models.lm import export
from hiso_jax.models.lm.trainable import tune
from hiso_jax.stacked import merge
from tests.marks import slow
from tests.models.lm.checkpoints import CONFIGS, LLAMA, write, write_tokenizer
from tests.models.lm.test_loading import WIDE, identical, write_gguf


def folder_of(folder, config):
    write(folder, config)
    write_tokenizer(folder)
    return folder


FAST = ("opt-350m", "llama-biased", "llama3", "qwen2-windowed", "gemma3-capped", "phi3-partial")


@pytest.mark.parametrize("name", [n if n in FAST else slow(n) for n in CONFIGS])
def test_a_checkpoint_is_exported_as_it_was_loaded(name, tmp_path):
    first = lm.load(folder_of(tmp_path / "a", CONFIGS[name]))
    lm.save_pretrained(first, tune(first), first.params, str(tmp_path / "b"))
    again = lm.load(tmp_path / "b")
    identical(again.params, first.params)
    assert again.decoder == first.decoder
    assert again.tokenizer("it was a great movie")["input_ids"] == first.tokenizer("it was a great movie")["input_ids"]


def test_a_ministral_is_exported_as_one(tmp_path):
    config = {**LLAMA, "model_type": "ministral", "sliding_window": 4}
    first = lm.load(folder_of(tmp_path / "a", config))
    written = export.transformers_config(first, first.decoder.config)
    assert (written["model_type"], written["architectures"]) == ("ministral", ["MinistralForCausalLM"])


def test_bfloat16_stays_bfloat16(tmp_path):
    first = lm.load(folder_of(tmp_path / "a", LLAMA), param_dtype="bfloat16")
    lm.save_pretrained(first, tune(first), first.params, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    identical(lm.load(tmp_path / "b", param_dtype="bfloat16").params, first.params)


@pytest.mark.parametrize("kind", ["plain", "linear", "yarn"])
def test_a_gguf_file_is_exported_with_a_configuration_of_its_own(kind, tmp_path):
    first = lm.load(write_gguf(tmp_path / "m.gguf", config=WIDE))
    if kind != "plain":
        rope = lm.Rope(kind=kind, factor=4.0, original=16 if kind == "yarn" else 64, attention_factor=1.25)
        rope = replace(rope, attention_factor=1.0) if kind == "linear" else rope
        first = replace(first, decoder=replace(first.decoder, config=replace(first.decoder.config, rope=rope)))
    lm.save_pretrained(first, tune(first), first.params, tmp_path / "b")
    again = lm.load(tmp_path / "b")
    identical(again.params, first.params)
    ours, theirs = again.decoder.config, first.decoder.config
    # Without a stretch of positions, the pre-trained length has no meaning.
    rope = replace(ours.rope, original=theirs.rope.original)
    assert replace(ours, rope=rope) == theirs
    assert kind == "plain" or ours.rope.original == theirs.rope.original


def test_llama_3_in_a_gguf_file_gets_its_scaling_back(tmp_path):
    from hiso_jax.models.lm.rope import frequencies

    first = lm.load(write_gguf(tmp_path / "m.gguf", config=WIDE))
    plain = lm.Rope(theta=500_000.0)
    stretched = lm.Rope(theta=500_000.0, kind="llama3", factor=8.0, original=8192)
    factors = frequencies(plain, 64) / frequencies(stretched, 64)
    for given, known in ((factors, True), (factors[::-1], False)):
        rope = lm.Rope(theta=500_000.0, kind="factors", factors=tuple(given.tolist()))
        config = replace(first.decoder.config, rope=rope, head_dim=64)
        if known:
            assert lm.from_transformers(export.transformers_config(first, config)).rope == stretched
        else:
            with pytest.raises(ValueError, match="rotary factors are not those of Llama 3"):
                export.transformers_config(first, config)


def test_large_checkpoints_are_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 20_000)
    first = lm.load(folder_of(tmp_path / "a", LLAMA))
    files = lm.save_pretrained(first, tune(first), first.params, tmp_path / "b")
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) < 25_000
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    identical(lm.load(tmp_path / "b").params, first.params)


@pytest.mark.thorough
@pytest.mark.parametrize("trainable", ["lora", "head", "mlp"])
def test_parts_that_were_trained_are_in_the_whole(trainable, tmp_path):
    first = lm.load(folder_of(tmp_path / "a", {**LLAMA, "tie_word_embeddings": True}))
    tuned = tune(first, trainable, lora_targets=("q_proj", "down_proj"))
    trained = jax.tree.map(lambda x: np.asarray(x + 0.1), tuned.trained)
    lm.save_pretrained(first, tuned, trained, tmp_path / "b")
    again = lm.load(tmp_path / "b")
    tokens = np.arange(12).reshape(1, 12).astype(np.int32)
    mask = np.ones((1, 12), bool)

    def logits(decoder, params):
        return decoder.logits(params, decoder.hidden(params, tokens, mask))

    ours = logits(tuned.decoder, merge(trained, tuned.frozen))
    np.testing.assert_allclose(logits(again.decoder, again.params), ours, atol=2e-5)
    assert np.abs(ours - logits(first.decoder, first.params)).max() > 1e-2


def test_what_makes_a_model_itself_is_kept(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    folder = folder_of(tmp_path / "a", LLAMA)
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template, tokenizer.model_max_length = template, 48
    tokenizer.add_special_tokens({"additional_special_tokens": ["great"]})
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": [1, 2]}))
    first = lm.load(folder)
    lm.save_pretrained(first, tune(first), first.params, tmp_path / "b")
    again = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert (again.chat_template, again.model_max_length) == (template, 48)
    assert "great" in again.all_special_tokens
    generating = GenerationConfig.from_pretrained(tmp_path / "b")
    assert (generating.temperature, generating.eos_token_id) == (0.6, [1, 2])


def test_a_gguf_file_keeps_its_chat_template_and_its_length(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    first = lm.load(write_gguf(tmp_path / "m.gguf", config=WIDE, fields=[("tokenizer.chat_template", template)]))
    lm.save_pretrained(first, tune(first), first.params, tmp_path / "b")
    again = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert again.chat_template == template
    assert again.model_max_length == WIDE["max_position_embeddings"]
    assert GenerationConfig.from_pretrained(tmp_path / "b").eos_token_id == 1


@pytest.mark.parametrize(("size", "kept"), [(3e-3, "float32"), (1.0, "bfloat16")])
def test_a_change_below_bfloat16_is_written_in_float32(size, kept, tmp_path, caplog):
    first = lm.load(folder_of(tmp_path / "a", LLAMA), param_dtype="bfloat16")
    tuned = tune(first, "lora")
    trained = jax.tree.map(lambda x: size * np.ones_like(np.asarray(x, np.float32)), tuned.trained)
    lm.save_pretrained(first, tuned, trained, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == kept
    assert ("round away" in caplog.text) == (kept == "float32")
    again = lm.load(tmp_path / "b")

    def kernel(params):
        found = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "q_proj" in str(path)]
        return np.asarray(found[0], np.float32)

    # A·B·α/r of ones, times size².
    changed = kernel(again.params) - kernel(first.params)
    np.testing.assert_allclose(changed, 16.0 * size**2, rtol=0.05 if kept == "float32" else 0.1)


def test_a_learned_prefix_has_no_place_in_transformers(tmp_path):
    first = lm.load(folder_of(tmp_path / "a", LLAMA))
    tuned = tune(first, "prefix")
    with pytest.raises(ValueError, match="format must be delta for --trainable prefix"):
        lm.save_pretrained(first, tuned, tuned.trained, tmp_path / "b")
    assert not (tmp_path / "b").exists()
