"""Small checkpoints of every supported architecture: configurations, weights from a seed, and a tokenizer."""

import json
from pathlib import Path

import numpy as np

COMMON = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
          "max_position_embeddings": 64}  # fmt: skip
OPT = {**COMMON, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32}
LLAMA = {**COMMON, "model_type": "llama", "intermediate_size": 48, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}


def rope(kind, **settings):
    return {**LLAMA, "rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, **settings}}


LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS = {
    "opt": OPT,
    "opt-350m": {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "llama": LLAMA,
    "llama-biased": {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "llama3": rope("llama3", **LLAMA3),
    "linear": rope("linear", factor=4.0),
    "dynamic": {**rope("dynamic", factor=2.0), "max_position_embeddings": 8},
    "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=16),
    "qwen2": {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-windowed": {
        **LLAMA,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 4},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3-windowed": {
        **LLAMA,
        "model_type": "qwen3",
        "head_dim": 16,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "smollm3": {**LLAMA, "model_type": "smollm3", "pad_token_id": 1, "no_rope_layer_interval": 2},
    "smollm3-windowed": {
        **LLAMA,
        "model_type": "smollm3",
        "pad_token_id": 1,
        "tie_word_embeddings": False,
        "mlp_bias": True,
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 4,
    },
}
GEMMA3 = {
    **LLAMA,
    "model_type": "gemma3_text",
    "head_dim": 16,
    "num_hidden_layers": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 24,
    "sliding_window": 4,
    "sliding_window_pattern": 2,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 100.0,
    "pad_token_id": 0,
}
PHI3 = {**LLAMA, "model_type": "phi3", "pad_token_id": 0, "original_max_position_embeddings": 16}
CONFIGS |= {
    "gemma3": GEMMA3,
    "gemma3-capped": {
        **GEMMA3,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "final_logit_softcapping": 2.0,
        "tie_word_embeddings": False,
    },
    "gemma2": {
        **GEMMA3,
        "model_type": "gemma2",
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 3.0,
        "attention_bias": True,
        "rope_theta": 10000.0,
    },
    "phi3": PHI3,
    "phi3-partial": {**PHI3, "partial_rotary_factor": 0.75, "sliding_window": 4},
    "phi3-long": {
        **PHI3,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 2.0],
            "long_factor": [1.0, 4.0, 8.0, 16.0],
        },
    },
}
del CONFIGS["gemma2"]["sliding_window_pattern"], CONFIGS["gemma2"]["rope_local_base_freq"]
LENGTHS, WIDTH = (12, 9, 5), 12


def tensor_shapes(config):
    """The shapes in a Hugging Face checkpoint of ``config``, written down apart from the library under test."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    if config["model_type"] == "opt":
        embed, ffn = config["word_embed_proj_dim"], config["ffn_dim"]
        first = config.get("do_layer_norm_before", True)
        top = {
            "model.decoder.embed_tokens.weight": (config["vocab_size"], embed),
            "model.decoder.embed_positions.weight": (config["max_position_embeddings"] + 2, hidden),
        }
        if first:
            top |= {f"model.decoder.final_layer_norm.{part}": (hidden,) for part in ("weight", "bias")}
        if embed != hidden:
            top |= {
                "model.decoder.project_in.weight": (hidden, embed),
                "model.decoder.project_out.weight": (embed, hidden),
            }
        for layer in range(layers):
            prefix = f"model.decoder.layers.{layer}."
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                top |= {
                    f"{prefix}self_attn.{name}.weight": (hidden, hidden),
                    f"{prefix}self_attn.{name}.bias": (hidden,),
                }
            for name in ("self_attn_layer_norm", "final_layer_norm"):
                top |= {f"{prefix}{name}.{part}": (hidden,) for part in ("weight", "bias")}
            top |= {f"{prefix}fc1.weight": (ffn, hidden), f"{prefix}fc1.bias": (ffn,)}
            top |= {f"{prefix}fc2.weight": (hidden, ffn), f"{prefix}fc2.bias": (hidden,)}
        return top
    heads, kv, mlp = config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]
    width = config.get("head_dim", hidden // heads)
    top = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    gemma = config["model_type"].startswith("gemma")
    if not config.get("tie_word_embeddings", gemma or config["model_type"] == "smollm3"):
        top["lm_head.weight"] = (config["vocab_size"], hidden)
    biased = config.get("attention_bias", False)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q_proj", heads * width), ("k_proj", kv * width), ("v_proj", kv * width)):
            top[f"{prefix}self_attn.{name}.weight"] = (rows, hidden)
            if biased or config["model_type"] == "qwen2":
                top[f"{prefix}self_attn.{name}.bias"] = (rows,)
        top[f"{prefix}self_attn.o_proj.weight"] = (hidden, heads * width)
        if biased:
            top[f"{prefix}self_attn.o_proj.bias"] = (hidden,)
        if config["model_type"] in ("qwen3", "gemma3_text"):
            top |= {f"{prefix}self_attn.{name}.weight": (width,) for name in ("q_norm", "k_norm")}
        for name, shape in (("gate_proj", (mlp, hidden)), ("up_proj", (mlp, hidden)), ("down_proj", (hidden, mlp))):
            top[f"{prefix}mlp.{name}.weight"] = shape
            if config.get("mlp_bias", False):
                top[f"{prefix}mlp.{name}.bias"] = shape[:1]
        sandwich = ("pre_feedforward_layernorm", "post_feedforward_layernorm") if gemma else ()
        for name in ("input_layernorm", "post_attention_layernorm", *sandwich):
            top[f"{prefix}{name}.weight"] = (hidden,)
        if config["model_type"] == "phi3":
            for part in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up"):
                del top[f"{prefix}{part}_proj.weight"]
            top[f"{prefix}self_attn.qkv_proj.weight"] = ((heads + 2 * kv) * width, hidden)
            top[f"{prefix}mlp.gate_up_proj.weight"] = (2 * mlp, hidden)
    return top


def weights(config):
    """Every tensor of a checkpoint, drawn from a seed; norms near one."""
    rng = np.random.default_rng(0)
    drawn = {}
    for name, shape in sorted(tensor_shapes(config).items()):
        center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        drawn[name] = (center + 0.1 * rng.normal(size=shape)).astype(np.float32)
    return drawn


def write(folder: Path, config, tensors=None, shards=1):
    """A checkpoint folder: config.json and safetensors, in one file or several."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = weights(config) if tensors is None else tensors
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    where = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def inputs(side):
    """Token ids [3, 12] of three lengths, padded on one side, and the mask of the real ones."""
    tokens = np.random.default_rng(1).integers(0, COMMON["vocab_size"], (len(LENGTHS), WIDTH))
    places = np.arange(WIDTH)
    mask = np.stack([places >= WIDTH - n if side == "left" else places < n for n in LENGTHS])
    return np.where(mask, tokens, 1).astype(np.int32), mask


def torch_logits(folder, side):
    """transformers' own logits for a checkpoint folder; needs torch."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    tokens, mask = inputs(side)
    known = {"attention_mask": torch.tensor(mask.astype(np.int64))}
    if AutoConfig.from_pretrained(folder).model_type != "opt":
        # OPT finds the positions itself; the other models receive them from generate().
        known["position_ids"] = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
    with torch.no_grad():
        return model(torch.tensor(tokens.astype(np.int64)), **known).logits.numpy()


# fmt: off
WORDS = [
    "<s>", "</s>", "<unk>", "it", "was", "good", "bad", "the", "film", "a", "great", "terrible", "movie", "very",
    "dull", "fun", "what", "is", "color", "of", "sky", "answer", "blue", "red", "question", "?", ":", "\n",
]
# fmt: on


def write_tokenizer(folder: Path, bos=True):
    """A word-level tokenizer over ``WORDS``; a blank before a word does not matter to it."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[?:]|[^\s?:]+"), "removed", invert=True)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


if __name__ == "__main__":
    # Golden logits from transformers' torch models: python -m tests.models.lm.checkpoints
    import tempfile

    # Those that are there stay, bit for bit.
    known = np.load(Path(__file__).with_name("golden_logits.npz"))
    golden = {}
    for name, config in CONFIGS.items():
        if any(key.startswith(f"{name} ") for key in known.files):
            golden |= {key: known[key] for key in known.files if key.startswith(f"{name} ")}
            continue
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), config)
            for side in ("left", "right"):
                logits = torch_logits(folder, side)
                # The scores of a few tokens at every real position are as good a check as all scores.
                golden[f"{name} {side}"] = logits[inputs(side)[1]][:, ::7].astype(np.float32)
    np.savez_compressed(Path(__file__).with_name("golden_logits.npz"), **golden)
