"""The known entries of a configuration, for each family; an unknown entry with a value that is not neutral is refused.

Many programs write configurations, and many read them. A reader that silently ignores an entry makes another model of
the same weights. So every entry of a file belongs to one of three groups: ``config.py`` reads it, it does not change a
forward pass, or its value must mean "as if it were absent".

Sources: transformers 5.24 and 4.5x (configurations and modelling code of the families), and files of the hub.
Transformers does not read some entries of ``NEUTRAL`` for these families; they belong to other families (Granite,
Cohere). Refusing them is stricter than transformers, which ignores them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from hiso_jax.checks import ParameterError

FAMILIES = (
    "opt", "llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "phi3"
)  # fmt: skip
# The neutral values of an entry that is not listed.
NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})


def names(text: str) -> frozenset[str]:
    """The names in a text, separated by white space."""
    return frozenset(text.split())


LLAMA_READ = names(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act rms_norm_eps max_position_embeddings tie_word_embeddings rope_theta rope_scaling rope_parameters "
    "partial_rotary_factor original_max_position_embeddings"
)
GEMMA_READ = (LLAMA_READ - {"hidden_act"}) | names(
    "hidden_activation attention_bias query_pre_attn_scalar sliding_window layer_types sliding_window_pattern "
    "final_logit_softcapping"
)
READ: Mapping[str, frozenset[str]] = {
    "opt": names(
        "vocab_size hidden_size num_hidden_layers num_attention_heads ffn_dim word_embed_proj_dim activation_function "
        "max_position_embeddings enable_bias do_layer_norm_before _remove_final_layer_norm "
        "layer_norm_elementwise_affine tie_word_embeddings"
    ),
    "llama": LLAMA_READ | {"attention_bias", "mlp_bias"},
    "mistral": LLAMA_READ | {"sliding_window", "layer_types"},
    "ministral": LLAMA_READ | {"sliding_window", "layer_types"},
    "qwen2": LLAMA_READ | {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"},
    "qwen3": LLAMA_READ
    | {"attention_bias", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"},
    "smollm3": LLAMA_READ
    | names(
        "attention_bias mlp_bias no_rope_layers no_rope_layer_interval use_sliding_window sliding_window layer_types"
    ),
    "gemma2": GEMMA_READ | {"attn_logit_softcapping"},
    "gemma3_text": GEMMA_READ | {"rope_local_base_freq"},
    "phi3": LLAMA_READ | {"sliding_window"},
}

# Entries that do not change a forward pass: metadata, the form of outputs, tasks and heads that a language model does
# not have, token ids, training, generation.
HARMLESS = names(
    """
    model_type architectures name_or_path transformers_version commit_hash auto_map torch_dtype dtype tokenizer_class
    processor_class revision transformers.js_config is_llama_config unsloth_version unsloth_fixed model_name license
    language custom_pipelines custom_generate keys_to_ignore_at_inference attn_implementation experts_implementation
    use_flash_attn use_flash_attention use_flash_attn_2 use_sdpa bf16 fp16 fp32 softmax_in_fp32

    return_dict use_return_dict output_hidden_states output_attentions output_router_logits torchscript
    tie_last_hidden_states use_cache gradient_checkpointing xla_device use_bfloat16 tf_legacy_loss
    chunk_size_feed_forward is_decoder tie_encoder_decoder cross_attention_hidden_size

    id2label label2id num_labels problem_type finetuning_task task_specific_params prefix classifier_dropout
    summary_type summary_use_proj loss_type ignore_index

    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id cls_token_id mask_token_id decoder_start_token_id
    bos_token eos_token pad_token unk_token model_max_length max_sequence_length max_seq_len max_seq_length seq_length
    tokenizer_model_max_length tokenizer_padding_side padding_side

    initializer_range init_std initializer_factor attention_dropout activation_dropout dropout hidden_dropout
    hidden_dropout_prob attention_probs_dropout_prob resid_pdrop embd_pdrop attn_pdrop resid_dropout embd_dropout
    output_past is_composition layerdrop neftune_noise_alpha router_aux_loss_coef pretraining_tp

    max_length max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings do_sample num_beams use_mtp
    cache_implementation cache_config max_cache_len temperature top_k top_p min_p top_h typical_p epsilon_cutoff
    eta_cutoff repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids
    renormalize_logits forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens sequence_bias token_healing guidance_scale watermarking_config
    num_return_sequences output_scores output_logits return_dict_in_generate encoder_no_repeat_ngram_size is_assistant
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold prompt_lookup_num_tokens
    max_matching_ngram_size assistant_early_exit assistant_lookbehind target_lookbehind assistant_ensemble_weight
    speculation_type compile_config disable_compile continuous_batching_config low_memory penalty_alpha dola_layers
    diversity_penalty num_beam_groups constraints force_words_ids prefill_chunk_size generation_config
    use_model_defaults forced_decoder_ids
    """
)
# Harmless entries of one family: its code does not read them, or reads them differently from another family's code.
OWN_HARMLESS: Mapping[str, frozenset[str]] = {
    "opt": frozenset(),
    "llama": frozenset({"max_window_layers"}),
    "mistral": frozenset({"max_window_layers"}),
    "ministral": frozenset({"max_window_layers"}),
    # Queries, keys and values always have biases; outputs never do.
    "qwen2": frozenset({"attention_bias"}),
    "qwen3": frozenset(),
    # An entry of Qwen's that its configurations have and its code does not read.
    "smollm3": frozenset({"max_window_layers"}),
    # Their code reads hidden_activation.
    "gemma2": frozenset({"hidden_act"}),
    "gemma3_text": frozenset({"hidden_act"}),
    "phi3": frozenset(),
}

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None, {}),
    # False and null make the mask bidirectional.
    "is_causal": (True,),
    "per_layer_config": (None, {}),
    "fusion_config": (None, {}),
    # A file that is read instead of model.safetensors.
    "transformers_weights": (None, ""),
    "text_config": (None, {}),
    "is_encoder_decoder": (False, None),
    "attention_chunk_size": (None, 0),
    "mlp_layer_types": (None, []),
    "quantization": (None, {}),
    "compression_config": (None, {}),
    "kv_cache_scheme": (None, {}),
    "peft_config": (None, {}),
    "adapters": (None, {}),
    "lora_config": (None, {}),
    "pruned_heads": (None, {}, []),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "residual_multiplier": (None, 1),
    "embedding_multiplier": (None, 1),
    "scale_emb": (None, 1),
    "width_multiplier": (None, 1),
    "no_bias": (None, True),
    "rotary_pct": (None, 1),
    "rope_local_base_freq": (None,),
}
OWN_NEUTRAL: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "opt": {
        "learned_embeddings": (None, True),
        "layer_norm_eps": (None, 1e-5),
        "layer_norm_epsilon": (None, 1e-5),
    },
    "llama": {"sliding_window": (None,), "layer_types": (None,)},
    "mistral": {"use_sliding_window": (None, True)},
    "ministral": {"use_sliding_window": (None, True)},
    "qwen2": {},
    "qwen3": {"use_qk_norm": (None, True)},
    "smollm3": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {},
}

# Entries of the rotary embeddings: those that each kind reads, and those that must be neutral.
ROPE_READ: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": names(
        "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim truncate"
    ),
    "longrope": names("short_factor long_factor factor attention_factor original_max_position_embeddings"),
}
ROPE_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
ROPE_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "factor": (None, 1),
    "attention_factor": (None, 1),
    "attn_factor": (None, 1),
    "extrapolation_factor": (None, 1),
    "apply_yarn_scaling": (None, True),
    "finetuned": (None, False, True),
}
# These kinds do not read the context length of pre-training, in transformers neither.
ROPE_IGNORED: Mapping[str, frozenset[str]] = {
    "default": frozenset({"original_max_position_embeddings"}),
    "linear": frozenset({"original_max_position_embeddings"}),
    "dynamic": frozenset({"original_max_position_embeddings"}),
    "llama3": frozenset(),
    "yarn": frozenset(),
    "longrope": frozenset(),
}


def _is_one_of(value: Any, allowed: Iterable[Any]) -> bool:
    # True == 1 and False == 0 in Python, and in a configuration they mean the same.
    return any(value == other for other in allowed)


def _sizes(content: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The neutral values of entries that repeat the model's sizes."""
    hidden, heads = content.get("hidden_size"), content.get("num_attention_heads")
    width = content.get("head_dim")
    if not width and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        width = hidden // heads
    layers = content.get("num_hidden_layers")
    ones = [1] * layers if isinstance(layers, int) and 0 <= layers < 2**12 else []
    own = ("query_pre_attn_scalar", "kv_channels", "rotary_dim", "rope_dim")
    found: dict[str, tuple[Any, ...]] = {name: (None, width) for name in own}
    found["no_rope_layers"] = (None, [], ones)
    found["hidden_activation"] = (None, content.get("hidden_act"))
    if content.get("model_type") == "opt":
        found |= {"head_dim": (None, width), "num_key_value_heads": (None, heads)}
    return found


def check_known(content: Mapping[str, Any]) -> None:
    """Refuse a configuration with an unknown entry that may change what the model computes.

    Args:
      content: the contents of a ``config.json`` of a supported family.

    Raises:
      ValueError: the value of an entry may change what the model computes; the message names the entry.
    """
    family = content["model_type"]
    sizes, own = _sizes(content), OWN_NEUTRAL[family]
    for name, value in content.items():
        if name in READ[family] or name in HARMLESS or name in OWN_HARMLESS[family]:
            continue
        if name.startswith("_") and name not in own:
            continue
        allowed = own.get(name) or sizes.get(name) or NEUTRAL.get(name, NOTHING)
        if not _is_one_of(value, allowed):
            raise ValueError(_refusal(f"an entry {name} of {_shown(value)}", family, name, value))


def check_rope(kind: str, given: Mapping[str, Any]) -> None:
    """Refuse rotary embeddings with an entry that is unknown for their kind.

    Args:
      kind: a key of :data:`ROPE_READ`.
      given: the entries.

    Raises:
      ValueError: the value of an entry may change what the model computes; the message names the entry.
    """
    for name, value in given.items():
        if name in ROPE_READ[kind] or name in ROPE_COMMON or name in ROPE_IGNORED[kind]:
            continue
        if not _is_one_of(value, ROPE_NEUTRAL.get(name, NOTHING)):
            raise ParameterError(
                "model",
                f"must have rotary embeddings that are known here; of the kind {kind} its configuration says "
                f"{name} {_shown(value)}",
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _refusal(said: str, family: str, name: str, value: Any) -> str:
    if name == "quantization_config":
        method = value.get("quant_method", "a method without a name") if isinstance(value, Mapping) else _shown(value)
        return (
            f"model must have weights that are not quantised; its configuration says quantization_config of {method}: "
            "take the checkpoint that it was made of, or a GGUF file"
        )
    return (
        f"model must be of a configuration that is known here; that of {family} has {said}, which may change what the "
        "model computes (remove the entry if it does not)"
    )
