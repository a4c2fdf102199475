"""Checkpoints of strangers: they are bounded before they are read, and none of their code is passed on."""

import json
import os
import struct
import time
from dataclasses import replace

import numpy as np
import pytest

from hiso_jax.models import lm
from hiso_jax.models.lm import tune
from hiso_jax.models.lm.checkpoint import read_config, read_safetensors
from tests.models.lm.checkpoints import LLAMA, write, write_tokenizer


def gguf(*parts):
    return b"GGUF" + b"".join(parts)


KEY = struct.pack("<Q", 1) + b"a"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        # 2⁶⁰ strings in an array, in 49 bytes.
        (
            gguf(struct.pack("<IQQ", 3, 0, 1), KEY, struct.pack("<IIQ", 9, 8, 2**60)),
            "claims 1,152,921,504,606,846,976 entries",
        ),
        (gguf(struct.pack("<IQQ", 3, 0, 2**61)), "claims 2,305,843,009,213,693,952 fields"),
        (gguf(struct.pack("<IQQ", 3, 2**50, 0), bytes(40)), "claims 0 fields and 1,125,899,906,842,624 tensors"),
        (gguf(struct.pack("<IQQ", 3, 0, 1), struct.pack("<Q", 2**63), bytes(40)), "where 40 are left"),
        (gguf(struct.pack("<IQQ", 9, 0, 0)), "it has version 9"),
        (gguf(struct.pack("<IQQ", 3, 0, 1), KEY, struct.pack("<I", 77), bytes(40)), "a value of the unknown type 77"),
        (b"GGML" + bytes(40), "it does not begin with GGUF"),
        (b"", "is no GGUF file"),
    ],
)
def test_a_gguf_file_that_claims_more_than_it_holds_is_refused_at_once(content, sentence, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=sentence):
        lm.load(path)
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/dev/zero", "a/b", "..", "", 3, None])
def test_an_index_names_files_of_its_own_folder(name, tmp_path):
    folder = write(tmp_path / "a", LLAMA)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="must name files of its own folder"):
        read_safetensors(folder, read_config(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "x.safetensors"])
def test_pipes_are_not_waited_for(name, tmp_path):
    folder = write(tmp_path / "a", LLAMA)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=f"model must be a folder of files; .*{name} is none"):
        lm.load(folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_hidden_layers": 10**9}, "a layers of 1 to 4,096; its configuration has 1000000000"),
        ({"vocab_size": 2**31}, "a vocab_size of 1 to 16,777,216"),
        ({"intermediate_size": 2**20}, "numbers where the architecture has"),
        ({"hidden_size": "32"}, "valid config.json"),
        ({"num_key_value_heads": 3}, "heads in groups of 3"),
        ({"rms_norm_eps": -1.0}, "a norm_eps between 0 and 1"),
        ({"rope_theta": 0.0, "rope_parameters": {"rope_theta": -1.0, "rope_type": "default"}}, "a positive theta"),
    ],
)
def test_an_absurd_configuration_allocates_nothing(change, sentence, tmp_path):
    folder = write(tmp_path / "a", LLAMA)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **change}))
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=sentence):
        read_safetensors(folder, read_config(folder))
    # transformers took 90 s and 16 GB to build the layers.
    assert time.perf_counter() - begin < 10


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{", "\x00"])
def test_a_configuration_that_is_no_object_is_one_sentence(text, tmp_path):
    folder = write(tmp_path / "a", LLAMA)
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"model must be a folder with a readable config\.json") as caught:
        read_config(folder)
    assert "\n" not in str(caught.value)


def test_an_export_does_not_say_whose_code_to_run(tmp_path):
    folder = write(tmp_path / "a", LLAMA)
    write_tokenizer(folder)
    theirs = {"AutoModelForCausalLM": "somebody/else--modeling.Evil"}
    (folder / "config.json").write_text(json.dumps({**LLAMA, "auto_map": theirs}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "auto_map": {"AutoTokenizer": ["evil.T", None]}})
    )
    loaded = lm.load(folder)
    lm.save_pretrained(loaded, tune(loaded), loaded.params, tmp_path / "b")
    for path in (tmp_path / "b").glob("*.json"):
        assert "auto_map" not in path.read_text()


def test_a_pattern_that_never_ends_is_refused(tmp_path):
    """A stranger's delta may name such a pattern; on long names a backtracking search takes years."""
    folder = write(tmp_path / "a", LLAMA)
    write_tokenizer(folder)
    loaded = lm.load(folder)
    with pytest.raises(ValueError, match="trainable must be a regular expression that ends"):
        tune(loaded, r"^((a|[a-z_.]|..)+)+[0-9A-Z]$")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"trainable": "lora", "lora_rank": 10**8}, "lora_rank must be at most the model's width, 32, got 100000000"),
        ({"trainable": "prefix", "prefix_tokens": 10**8}, "prefix_tokens must be at least 1 and at most 63"),
    ],
)
def test_adapters_are_no_larger_than_the_model(settings, sentence, tmp_path):
    folder = write(tmp_path / "a", LLAMA)
    write_tokenizer(folder)
    loaded = lm.load(folder)
    with pytest.raises(ValueError, match=sentence):
        tune(loaded, **settings)
    assert replace(loaded).params is loaded.params
    assert np.isfinite(loaded.params["norm"]["scale"]).all()
