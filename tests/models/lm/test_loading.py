"""Loading: a file that cannot be read is refused in one clear sentence, and every format gives the same model."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiso_jax.models import lm
from hiso_jax.models.lm.checkpoint import Pretrained, read_config, read_safetensors
from hiso_jax.models.lm.export import transformers_config
from hiso_jax.models.lm.gguf import open_gguf
from tests.models.lm.checkpoints import CONFIGS, LLAMA, WORDS, weights, write, write_tokenizer


def identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_shards_are_one_checkpoint(tmp_path):
    whole, parts = write(tmp_path / "a", LLAMA), write(tmp_path / "b", LLAMA, shards=3)
    config = read_config(whole)
    identical(read_safetensors(whole, config), read_safetensors(parts, config))


def test_a_bare_model_lacks_the_prefix_of_its_names(tmp_path):
    bare = {name.removeprefix("model."): tensor for name, tensor in weights(CONFIGS["opt"]).items()}
    whole, folder = write(tmp_path / "a", CONFIGS["opt"]), write(tmp_path / "b", CONFIGS["opt"], bare)
    config = read_config(whole)
    identical(read_safetensors(whole, config), read_safetensors(folder, config))


def test_bfloat16_parameters_are_the_cast_of_the_float32_ones(tmp_path):
    folder = write(tmp_path, LLAMA)
    config = read_config(folder)
    half = read_safetensors(folder, config, jnp.bfloat16)
    identical(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), read_safetensors(folder, config)))


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 2.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0] * 4,
    "original_max_position_embeddings": 16,
}


def damaged(kind, folder):
    tensors = weights(LLAMA)
    name = "model.layers.1.mlp.up_proj.weight"
    if kind == "missing":
        del tensors[name]
    if kind == "shape":
        tensors[name] = tensors[name][:-1]
    if kind == "extra":
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
    write(folder, LLAMA, tensors, shards=2 if kind == "shard" else 1)
    if kind == "truncated":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    if kind == "empty":
        (folder / "model.safetensors").unlink()
    if kind == "shard":
        (folder / "model-00002-of-00002.safetensors").unlink()
    if kind == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    if kind in ("gpt2", "kind", "json", "norms"):
        changes = {
            "gpt2": {"model_type": "gpt2"},
            "kind": {"rope_parameters": LONGROPE},
            "norms": {"layer_norm_elementwise_affine": False},
            "json": {},
        }[kind]
        content = json.dumps({**(CONFIGS["opt"] if kind == "norms" else LLAMA), **changes})
        (folder / "config.json").write_text(content[:30] if kind == "json" else content)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("missing", r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"),
        ("shape", r"up_proj\.weight has 1,504 numbers where the architecture has 1,536, of shape \(32, 48\)"),
        ("extra", r"tensors that its architecture does not know: model\.layers\.0\.self_attn\.q_norm\.weight"),
        ("truncated", "model.safetensors is truncated or damaged"),
        ("empty", "has none"),
        ("pickle", "model must have safetensors files"),
        ("shard", "lacks model-00002-of-00002.safetensors, which its index names"),
        ("gpt2", "architectures opt, llama, mistral, ministral, qwen2, qwen3, smollm3, .*; got gpt2"),
        ("kind", "rotary embeddings of its family; llama with longrope is not known"),
        ("norms", "OPT without layer_norm_elementwise_affine"),
        ("json", "readable config.json"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_one_sentence(kind, sentence, tmp_path):
    damaged(kind, tmp_path)
    with pytest.raises(ValueError, match=sentence) as caught:
        read_safetensors(tmp_path, read_config(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_name_that_is_nowhere_is_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="nobody/nothing is not a local folder and cannot be loaded from the hub"):
        lm.load("nobody/nothing")


def test_safetensors_of_the_hub_s_converter_are_found(tmp_path, monkeypatch):
    """An old checkpoint has pickles on its main branch; pickles are never read."""
    import huggingface_hub

    main, converted, asked = tmp_path / "snapshots" / "main", write(tmp_path / "converted", LLAMA), []
    main.mkdir(parents=True)
    write_tokenizer(converted)

    def snapshot_download(name, *, allow_patterns, ignore_patterns, revision=None, local_files_only=False):
        assert not any("bin" in pattern for pattern in allow_patterns)
        asked.append((name, revision))
        return str(main if revision is None else converted)

    class Discussion:
        is_pull_request, git_reference = True, "refs/pr/4"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_repo_discussions", lambda self, name, author: iter([Discussion()]))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, revision, timeout: None)
    with pytest.raises(ValueError, match="has none at main: --revision converted takes those in the pull request"):
        lm.load("someone/old")
    loaded = lm.load("someone/old", revision="converted")
    assert asked == [("someone/old", None), ("someone/old", "refs/pr/4")]
    identical(loaded.params, read_safetensors(converted, read_config(converted)))
    assert loaded.tokenizer("the film was good")["input_ids"] == [0, 7, 8, 4, 5]
    # Once the converted revision is in the cache beside the main branch, the hub is not asked for it.
    write_tokenizer(write(tmp_path / "snapshots" / "converted", LLAMA))
    monkeypatch.delattr(huggingface_hub.HfApi, "get_repo_discussions")
    identical(lm.load("someone/old", revision="converted").params, loaded.params)


# GGUF: blocks of 32 and 256 values need wider rows.
WIDE = {**LLAMA, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": len(WORDS)}  # fmt: skip


def permuted(rows, heads):
    """Rows in the order in which llama.cpp keeps them: the halves of each head interleaved."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OWN_GGUF_NAMES = {
    "gemma": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    "phi3": {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
}


def write_gguf(path, config=WIDE, kind="F32", extra=(), fields=(), architecture="llama", tokens=True):
    """A GGUF file of a Llama checkpoint, with the layout and names that llama.cpp's converter gives it."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_tokenizer_model("gpt2")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    if tokens:
        writer.add_token_list([*letters, "ab", "Ġ"][: len(WORDS)])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    for name, value in fields:
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
        add[type(value)](name, value)
    names = GGUF_NAMES | OWN_GGUF_NAMES.get(architecture.rstrip("23"), OWN_GGUF_NAMES.get(architecture, {}))
    stored = {}
    for name, tensor in weights(config).items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        permute = heads.get(name.split(".")[-2]) if architecture == "llama" else None
        # llama.cpp keeps 1 + scale for the norms of Gemma.
        tensor = tensor + 1 if architecture.startswith("gemma") and name.endswith("norm.weight") else tensor
        stored[name] = tensor if permute is None else permuted(tensor, permute)
    for name, tensor in [*stored.items(), *extra]:
        quantized = gguf.GGMLQuantizationType["F32" if tensor.ndim == 1 else kind]
        if kind in ("Q4_K", "Q6_K") and tensor.ndim > 1:
            block, size = gguf.GGML_QUANT_SIZES[quantized]
            rng = np.random.default_rng(0)
            data = rng.integers(0, 255, (tensor.shape[0], tensor.shape[1] // block * size), np.uint8)
            # The scales of a block are half-precision numbers; keep them finite.
            data.reshape(-1, size)[:, -2:] = np.array([0.01], np.float16).view(np.uint8)
            data.reshape(-1, size)[:, :4] = np.array([0.01, 0.01], np.float16).view(np.uint8)
        else:
            data = gguf.quantize(tensor, quantized)
        writer.add_tensor(name, data, raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ERROR = {"F32": 0, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 1e-2, "Q4_0": 0.12, "Q4_1": 0.06, "Q5_0": 0.06, "Q5_1": 0.03}


@pytest.mark.parametrize("kind", ERROR)
def test_gguf_tensors_are_those_of_the_checkpoint(kind, tmp_path):
    config, tensors, _ = open_gguf(write_gguf(tmp_path / "m.gguf", kind=kind))
    from hiso_jax.models.lm.checkpoint import read_parameters
    from hiso_jax.models.lm.names import gguf_name

    params = read_parameters(tensors, config, gguf_name(config), jnp.float32, tmp_path)
    folder = write(tmp_path / "folder", WIDE)
    expected = read_safetensors(folder, read_config(folder))
    assert config.rope.theta == read_config(folder).rope.theta

    def close(ours, theirs):
        assert np.abs(ours - theirs).max() <= ERROR[kind] * np.abs(theirs).max()

    jax.tree.map(close, params, expected)


GEMMA = {**WIDE, "head_dim": 32, "num_hidden_layers": 3, "sliding_window": 8, "query_pre_attn_scalar": 32}
LONG = {
    "rope_type": "longrope",
    "attention_factor": 1.25,
    "short_factor": np.linspace(1, 2, 32).tolist(),
    "long_factor": [4.0] * 32,
}
GGUF_CASES = {
    "qwen3": ({**WIDE, "model_type": "qwen3", "head_dim": 32}, [], []),
    "gemma2": (
        {**GEMMA, "model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        [
            ("gemma2.attention.sliding_window", 8),
            ("gemma2.attn_logit_softcapping", 50.0),
            ("gemma2.final_logit_softcapping", 30.0),
        ],
        [],
    ),
    "gemma3": (
        {
            **GEMMA,
            "model_type": "gemma3_text",
            "sliding_window_pattern": 6,
            "rope_theta": 10000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        [
            ("gemma3.attention.sliding_window", 8),
            ("gemma3.rope.scaling.type", "linear"),
            ("gemma3.rope.scaling.factor", 8.0),
        ],
        [],
    ),
    "phi3": (
        {**WIDE, "model_type": "phi3", "pad_token_id": 0, "rope_scaling": LONG, "original_max_position_embeddings": 16},
        [("phi3.rope.scaling.original_context_length", 16), ("phi3.rope.scaling.attn_factor", 1.25)],
        [
            ("rope_factors_short.weight", np.array(LONG["short_factor"], np.float32)),
            ("rope_factors_long.weight", np.array(LONG["long_factor"], np.float32)),
        ],
    ),
}


@pytest.mark.parametrize("architecture", GGUF_CASES)
def test_a_gguf_file_is_the_model_of_its_folder(architecture, tmp_path):
    given, fields, extra = GGUF_CASES[architecture]
    path = write_gguf(tmp_path / "m.gguf", config=given, architecture=architecture, fields=fields, extra=extra)
    config, tensors, _ = open_gguf(path)
    from hiso_jax.models.lm.checkpoint import read_parameters
    from hiso_jax.models.lm.names import gguf_name

    folder = write(tmp_path / "folder", given)
    whole = read_config(folder)
    found = read_parameters(tensors, config, gguf_name(config), jnp.float32, tmp_path)
    # 1 + scale - 1 is rounded.
    tolerance = 2e-7 if architecture.startswith("gemma") else 0
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=0),
        found,
        read_safetensors(folder, whole),
    )
    # A GGUF file has float32.
    same = {"norm_eps": whole.norm_eps, "vocab_size": whole.vocab_size}
    if architecture == "phi3":
        factors = np.asarray(whole.rope.factors, np.float32).tolist()
        whole = dataclasses.replace(whole, rope=dataclasses.replace(whole.rope, factors=tuple(factors)))
    assert dataclasses.replace(config, **same) == whole
    # What an export writes describes the same architecture.
    if architecture != "phi3":
        pretrained = Pretrained(None, None, types.SimpleNamespace(bos_token_id=0, eos_token_id=1, pad_token_id=1), "")
        written = transformers_config(pretrained, config)
        assert dataclasses.replace(lm.from_transformers(written), **same) == whole


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_gguf_blocks_of_256_are_read(kind, tmp_path):
    _, tensors, _ = open_gguf(write_gguf(tmp_path / "m.gguf", kind=kind))
    read = tensors.read("blk.1.ffn_up.weight")
    assert read.shape == (256, 256)
    assert np.isfinite(read).all()
    assert read.std() > 0


def gguf_tokenizer(path, model, tokens, **fields):
    """The tokenizer of a GGUF file that holds nothing else of interest."""
    import gguf

    from hiso_jax.models.lm.gguf import _tokenizer

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    reader = gguf.GGUFReader(path)
    return _tokenizer({name: field.contents() for name, field in reader.fields.items()}, path)


def test_a_sentencepiece_tokenizer_merges_the_best_pieces_first(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", "<0x21>", "▁", "a", "b", "c", "bc", "▁a", "▁ab", "ab"]
    scores = [0.0, 0.0, 0.0, 0.0, -9.0, -8.0, -7.0, -6.0, -1.0, -2.0, -3.0, -4.0]
    kinds = [2, 3, 3, 6, 1, 1, 1, 1, 1, 1, 1, 1]
    tokenizer = gguf_tokenizer(
        tmp_path / "t.gguf", "llama", tokens, token_scores=scores, token_types=kinds, bos_token_id=1, eos_token_id=2
    )
    # In abc, bc has the best score, though ab comes first; ! is a byte.
    ids = tokenizer("abc ab!")["input_ids"]
    assert [tokens[i] for i in ids] == ["<s>", "▁a", "bc", "▁ab", "<0x21>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "abc ab!"


@pytest.mark.parametrize(
    ("style", "pieces"),
    [
        ("gpt-2", ["ab", "Ġ", "123", "4"]),
        ("smollm", ["ab", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["ab", "Ġ", "123", "4"]),
        ("qwen2", ["ab", "Ġ", "1", "2", "3", "4"]),
    ],
)
def test_a_byte_level_tokenizer_splits_as_its_model_does(style, pieces, tmp_path):
    tokens = ["<end>", "a", "b", "Ġ", "1", "2", "3", "4", "ab", "12", "123"]
    tokenizer = gguf_tokenizer(
        tmp_path / "t.gguf", "gpt2", tokens, token_merges=["a b", "1 2", "12 3"], tokenizer_pre=style, eos_token_id=0
    )
    ids = tokenizer("ab 1234")["input_ids"]
    assert [tokens[i] for i in ids] == pieces
    assert tokenizer.decode(ids) == "ab 1234"


def test_llama_3_begins_with_its_token_and_takes_whole_words_that_no_merge_makes(tmp_path):
    tokens = ["<begin>", "<end>", "a", "b", "c", "ab", "abc"]
    settings = {"token_merges": ["a b"], "tokenizer_pre": "llama-bpe", "bos_token_id": 0, "eos_token_id": 1}
    tokenizer = gguf_tokenizer(tmp_path / "t.gguf", "gpt2", tokens, token_types=[3, 3, 1, 1, 1, 1, 1], **settings)
    assert [tokens[i] for i in tokenizer("abc")["input_ids"]] == ["<begin>", "abc"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"architecture": "gemma"}, "architectures llama, qwen2, qwen3, gemma2, gemma3, phi3; got gemma"),
        ({"fields": [("tokenizer.ggml.pre", "strange")]}, "splits text by strange"),
        ({"tokens": False}, "lacks the field tokenizer.ggml.tokens"),
        ({"cut": 2000}, "is no GGUF file, or a truncated one"),
        ({"cut": 10}, "is no GGUF file, or a truncated one"),
    ],
)
def test_a_gguf_file_that_cannot_be_read_is_one_sentence(settings, sentence, tmp_path):
    cut = settings.pop("cut", None)
    path = write_gguf(tmp_path / "m.gguf", **settings)
    if cut:
        path.write_bytes(path.read_bytes()[: -cut if cut > 100 else cut])
    with pytest.raises(ValueError, match=sentence):
        lm.load(path)
    with pytest.raises(ValueError, match="there is no file"):
        lm.load(tmp_path / "none.gguf")
