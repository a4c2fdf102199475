"""Export of parameters to a folder that transformers loads: config.json, tokenizer and sharded safetensors."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.models.lm.checkpoint import Pretrained, needing
from hiso_jax.models.lm.config import LMConfig
from hiso_jax.models.lm.decoder import Decoder
from hiso_jax.models.lm.names import as_theirs, checkpoint_name, leaves, part_of
from hiso_jax.models.lm.rope import frequencies
from hiso_jax.models.lm.torch_decoder import TorchDecoder, save_torch
from hiso_jax.models.lm.trainable import Tuned
from hiso_jax.paths import as_path
from hiso_jax.stacked import Stacked, merge

logger = logging.getLogger("hiso_jax")
SHARD_BYTES = 5 * 10**9
# Share of an addition that may be lost to the rounding of its kernel.
MOST_ROUNDED_AWAY = 0.05
# Entries of the base's configuration that are dropped: dtypes, which are written anew, and code of its repository.
DROPPED = ("dtype", "torch_dtype", "auto_map", "custom_pipelines")
ARCHITECTURES = {
    "opt": "OPTForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
THEIRS = {"gemma3": "gemma3_text"}
# The values of Llama 3.1 to 3.3; a GGUF file keeps only the factors that follow from them.
LLAMA3: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def save_pretrained(pretrained: Pretrained, tuned: Tuned, trained: PyTree, folder: Path | str) -> list[Path]:
    """Write a fine-tuned model as a folder that transformers loads; low-rank additions are merged into the kernels.

    Args:
      pretrained: the model before fine-tuning.
      tuned: the model with its trained and frozen parts.
      trained: the trained parameters.
      folder: the output folder, made if it does not exist.

    Returns:
      The weight files.

    Raises:
      ValueError: the model has a learned prefix, or rotary embeddings that transformers cannot express.
      OSError: the folder cannot be written.
    """
    folder, decoder = as_path("folder", folder), tuned.decoder
    if isinstance(decoder, TorchDecoder):
        assert pretrained.folder is not None
        folder.mkdir(parents=True, exist_ok=True)
        files = save_torch(pretrained.folder, decoder, tuned.whole(trained, tuned.frozen), folder)
        pretrained.tokenizer.save_pretrained(folder)
        return files
    if decoder.adapters.prefix:
        raise ParameterError(
            "format", "must be delta for --trainable prefix: transformers has no place for a learned prefix"
        )
    whole = trained if tuned.frozen is None else merge_arrays(trained, tuned.frozen)
    if decoder.adapters.rank:
        scale = decoder.adapters.alpha / decoder.adapters.rank
        lost = rounded_away(whole, scale)
        if lost > MOST_ROUNDED_AWAY:
            logger.warning(
                "the weights are written in float32, because the base's dtype would round away %.0f %% of the change "
                "that training made",
                100 * lost,
            )
            whole = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), whole)
        whole = multiplied_out(whole, scale)
    plain = Decoder(decoder.config)
    dtype = str(np.asarray(jax.tree.leaves(whole)[0]).dtype)
    config = transformers_config(pretrained, decoder.config, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generating = pretrained.generation_config
    if generating is None:
        roles = {name: getattr(pretrained.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        generating = {f"{name}_token_id": number for name, number in roles.items() if number is not None}
    (folder / "generation_config.json").write_text(json.dumps(generating, indent=2) + "\n")
    with needing("safetensors", "huggingface_hub"):
        files = _write_weights(dict(_tensors(whole, plain)), folder)
    for file in files:
        # safetensors writes files that only their owner can read.
        shutil.copymode(folder / "config.json", file)
    for name in DROPPED:
        pretrained.tokenizer.init_kwargs.pop(name, None)
    pretrained.tokenizer.save_pretrained(folder)
    return files


def merge_arrays(trained: PyTree, frozen: PyTree) -> PyTree:
    """The union of two nested dicts of arrays that share no leaf; layers stay stacked."""
    if isinstance(trained, Stacked) and isinstance(frozen, Stacked):
        return Stacked(merge_arrays(trained.layers, frozen.layers))
    if isinstance(trained, Mapping) and isinstance(frozen, Mapping):
        both = {name: merge_arrays(trained[name], frozen[name]) for name in trained.keys() & frozen.keys()}
        return {**trained, **frozen, **both}
    return merge(trained, frozen)


def rounded_away(node: Any, scale: float) -> float:
    """The share of a low-rank addition that the kernels' dtype would round away, by its Euclidean length; 0 to 1.

    An addition is much smaller than its kernel W, and bfloat16 keeps 8 bits: what is below W/256 is lost.
    """
    lengths = _lengths(node, scale)
    return float(np.sqrt(lengths[0] / lengths[1])) if lengths[1] else 0.0


def _lengths(node: Any, scale: float) -> np.ndarray:
    """The squared lengths of what rounding changes, and of the addition."""
    if isinstance(node, Stacked):
        return _lengths(node.layers, scale)
    if not isinstance(node, Mapping):
        return np.zeros(2)
    if "lora_a" not in node:
        return sum((_lengths(child, scale) for child in node.values()), np.zeros(2))
    kernel = np.asarray(node["kernel"])
    if kernel.dtype.itemsize >= np.dtype(np.float32).itemsize:
        return np.zeros(2)
    added = np.float32(scale) * (np.asarray(node["lora_a"], np.float32) @ np.asarray(node["lora_b"], np.float32))
    whole = kernel.astype(np.float32) + added
    lost = whole.astype(kernel.dtype).astype(np.float32) - whole
    return np.array([np.sum(lost**2, dtype=np.float64), np.sum(added**2, dtype=np.float64)])


def multiplied_out(node: Any, scale: float) -> Any:
    """The tree with each low-rank addition merged into its kernel, W + A·B·α/r, and A and B removed."""
    if isinstance(node, Stacked):
        return Stacked(multiplied_out(node.layers, scale))
    if not isinstance(node, Mapping):
        return node
    if "lora_a" in node:
        kernel = np.asarray(node["kernel"])
        product = np.asarray(node["lora_a"], np.float32) @ np.asarray(node["lora_b"], np.float32)
        rest = {name: leaf for name, leaf in node.items() if not name.startswith("lora_")}
        return {**rest, "kernel": (kernel + np.float32(scale) * product).astype(kernel.dtype)}
    return {name: multiplied_out(child, scale) for name, child in node.items()}


def _tensors(params: PyTree, decoder: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor with its name and its layout in a checkpoint; views where possible."""
    called = checkpoint_name(decoder.config)
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    joined: dict[str, dict[int, np.ndarray]] = {}
    for leaf, array in zip(leaves(params), arrays, strict=True):
        for layer in [None] if leaf.layers is None else range(leaf.layers):
            own = as_theirs(leaf.name, array if layer is None else array[layer])
            part = part_of(decoder.config, leaf.name)
            if part is None:
                yield called(leaf.name, layer), own
            else:
                joined.setdefault(called(leaf.name, layer), {})[part.start] = own
    for name, parts in joined.items():
        yield name, np.concatenate([parts[start] for start in sorted(parts)])


def _write_weights(tensors: Mapping[str, np.ndarray], folder: Path) -> list[Path]:
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.numpy import save_file

    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    files = []
    for name, members in plan.filename_to_tensors.items():
        shard = {member: np.ascontiguousarray(tensors[member]) for member in members}
        save_file(shard, folder / name, metadata={"format": "pt"})
        files.append(folder / name)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return files


def transformers_config(pretrained: Pretrained, config: LMConfig, dtype: str = "float32") -> dict[str, Any]:
    """The contents of config.json for a model of the architecture ``config``, fine-tuned from ``pretrained``.

    Args:
      pretrained: the model before fine-tuning.
      config: the architecture.
      dtype: the dtype of the written weights.

    Raises:
      ValueError: transformers cannot express the rotary embeddings.
    """
    # Ministral is Mistral here; the base's configuration says which of the two transformers must build.
    theirs = (pretrained.hf_config or {}).get("model_type", THEIRS.get(config.family, config.family))
    common = {
        "architectures": [ARCHITECTURES[theirs]],
        "tie_word_embeddings": config.tied,
        "torch_dtype": dtype,
    }
    if pretrained.hf_config is not None:
        kept = {name: value for name, value in pretrained.hf_config.items() if name not in DROPPED}
        return {**kept, **common}
    tokenizer = pretrained.tokenizer
    return {
        **common,
        "model_type": theirs,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        **({} if config.norm_offset else {"hidden_act": config.activation}),
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        **_rope_config(config),
        **_bias_config(config),
        **_window_config(config),
        **(_gemma_config(config) if config.norm_offset else {}),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _bias_config(config: LMConfig) -> dict[str, Any]:
    if config.family in ("qwen2", "phi3"):
        return {}
    attention = {"attention_bias": config.qkv_bias}
    return {**attention, "mlp_bias": config.mlp_bias} if config.family == "llama" else attention


def _window_config(config: LMConfig) -> dict[str, Any]:
    if config.windows is None:
        return {}
    types = ["full_attention" if window >= config.max_positions else "sliding_attention" for window in config.windows]
    return {"sliding_window": min(config.windows)} | ({} if config.family == "phi3" else {"layer_types": types})


def _gemma_config(config: LMConfig) -> dict[str, Any]:
    assert config.attention_scale is not None
    own: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(config.attention_scale**-2),
        "final_logit_softcapping": config.logit_cap,
    }
    if config.local_rope is None:
        return own | {"attn_logit_softcapping": config.attention_cap}
    return own | {"rope_local_base_freq": config.local_rope.theta}


def _rope_config(config: LMConfig) -> dict[str, Any]:
    rope = config.rope
    assert rope is not None
    if rope.kind == "default":
        return {"rope_theta": rope.theta, **({"partial_rotary_factor": rope.share} if rope.share != 1 else {})}
    if config.family == "phi3":
        raise ParameterError("format", "must be delta for a Phi-3 with LongRoPE from a GGUF file")
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "yarn":
        scaling |= {"original_max_position_embeddings": rope.original, "attention_factor": rope.attention_factor}
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    if rope.kind == "factors":
        from dataclasses import replace

        scaling = {"rope_type": "llama3", "factor": max(rope.factors), **LLAMA3}
        guess = replace(
            rope,
            kind="llama3",
            factor=max(rope.factors),
            original=LLAMA3["original_max_position_embeddings"],
            low_freq_factor=LLAMA3["low_freq_factor"],
            high_freq_factor=LLAMA3["high_freq_factor"],
        )
        if not np.allclose(frequencies(guess, config.head_dim), frequencies(rope, config.head_dim), rtol=1e-4):
            raise ParameterError("format", "must be delta for a model whose rotary factors are not those of Llama 3")
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
