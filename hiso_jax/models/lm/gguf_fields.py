"""The metadata of a GGUF file: fields that are read, and other fields, which must be neutral.

Sources: llama.cpp's loader (``llama-model.cpp``, ``llama-hparams.h``, ``llama-vocab.cpp``), its converter from Hugging
Face (``convert_hf_to_gguf.py``) and ``gguf-py/constants.py``. llama.cpp's own writer puts nearly all fields into every
file, with their defaults: these count as neutral.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hiso_jax.checks import ParameterError, is_real
from hiso_jax.models.lm.config import Rope, RopeKind, temperature
from hiso_jax.models.lm.known import names

READ = names(
    "context_length embedding_length block_count feed_forward_length attention.head_count attention.head_count_kv "
    "attention.key_length attention.layer_norm_rms_epsilon rope.freq_base rope.scaling.type rope.scaling.factor "
    "rope.scaling.original_context_length rope.scale_linear rope.scaling.attn_factor rope.scaling.yarn_beta_fast "
    "rope.scaling.yarn_beta_slow rope.scaling.yarn_attn_factor rope.scaling.yarn_ext_factor rope.dimension_count "
    "attention.value_length"
)
# Fields of pooled embeddings, and of norms and layers that these architectures do not have.
HARMLESS = names(
    "vocab_size rope.scaling.finetuned pooling_type attention.layer_norm_epsilon attention.group_norm_epsilon "
    "attention.group_norm_groups attention.key_length_swa attention.value_length_swa rope.freq_base_swa "
    "rope.dimension_count_swa attention.relative_buckets_count features_length deepstack_mapping "
    "classifier.pooling_type"
)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window_pattern": (0, 1),
    "attention.rope_pattern": (1,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "attn_logit_softcapping": (0, 50),
    "final_logit_softcapping": (0, 30),
    "router_logit_softcapping": (0, 30),
    "expert_weights_scale": (0, 1),
    "hidden_activation": ("silu", "swish", "swiglu"),
    # The order of the rows of queries and keys.
    "tensor_data_layout": ("Meta AI original pth",),
    "token_shift_count": (0, 2),
    "decoder_start_token_id": (-1, 2**32 - 1),
    "attention.indexer.kpool_select_tail": (True, False),
    "kda.gate_lower_bound": (float("-inf"), 0),
}
# What the families read beside ``READ``.
_GEMMA = names(
    "attention.sliding_window attention.sliding_window_pattern rope.freq_base_swa final_logit_softcapping "
    "attention.key_length_swa attention.value_length_swa hidden_activation"
)
OWN_READ: Mapping[str, frozenset[str]] = {
    "gemma2": _GEMMA | {"attn_logit_softcapping"},
    "gemma3": _GEMMA,
    "phi3": frozenset({"attention.sliding_window"}),
}
KINDS: Mapping[str, RopeKind] = {"none": "default", "linear": "linear", "yarn": "yarn"}


class Fields(dict):
    """The metadata of a file; a missing field raises a one-sentence error."""

    def __init__(self, path: Path, contents: dict[str, Any]) -> None:
        """Hold the ``contents`` of the file at ``path``."""
        super().__init__(contents)
        self.path = path

    def __missing__(self, name: str) -> Any:
        """Refuse a name that the file does not have."""
        raise ValueError(f"{self.path} lacks the field {name}")

    def of(self, family: str, name: str, default: Any = None) -> Any:
        """A field of the architecture; if it is a list with the same value for each layer, that value."""
        full = f"{family}.{name}"
        value = self[full] if default is None else self.get(full, default)
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            return value[0]
        return value


def check_fields(fields: Fields, family: str, head_dim: int) -> None:
    """Refuse a file with an unknown field that may change what the model computes.

    Args:
      fields: the metadata of the file.
      family: the architecture.
      head_dim: the width of a head.

    Raises:
      ValueError: the value of a field may change what the model computes; the message names the field.
    """
    if fields.get("general.type", "model") != "model":
        raise ParameterError(
            "model", f"must be a GGUF file whose general.type is model; {fields.path} is {fields['general.type']}"
        )
    for name in ("rope.dimension_count", "attention.value_length"):
        width = fields.of(family, name, head_dim)
        # Phi-3 may rotate a part of each head.
        partial = family == "phi3" and name == "rope.dimension_count" and 0 < width < head_dim
        if width not in (0, head_dim) and not partial:
            raise ParameterError(
                "model", f"must have a {name} of its heads' width, {head_dim}; {fields.path} has {width}"
            )
    for full, value in fields.items():
        prefix, _, name = full.partition(".")
        if prefix != family or name in READ or name in HARMLESS or name in OWN_READ.get(family, ()):
            continue
        listed = value if isinstance(value, list) else [value]
        allowed = NEUTRAL.get(name, (0, ""))
        if name == "attention.sliding_window" and all(each >= fields.of(family, "context_length") for each in listed):
            continue
        if any(each not in allowed for each in listed):
            raise ParameterError(
                "model",
                f"must be of fields that are known here; {fields.path} has {full} {str(value)[:60]}, which may "
                "change what it computes",
            )


def rope_of(fields: Fields, family: str, head_dim: int, factors: np.ndarray | None) -> Rope:
    """The rotary embeddings of a file.

    A scaling without a type is linear, as in llama.cpp; older files have its factor in ``rope.scale_linear``. YaRN's
    values are those of the folder that the file was converted from: llama.cpp writes the betas and the attention
    factor, but does not read them for these architectures.

    Args:
      fields: the metadata of the file.
      family: the architecture.
      head_dim: the width of a head.
      factors: the factor of each frequency, from the tensor ``rope_freqs.weight`` (Phi-3:
        ``rope_factors_short.weight``); None for a file without it.

    Raises:
      ValueError: the kind is not supported, or its values do not fit together.
    """

    def number(name: str, default: float) -> float:
        value = fields.of(family, f"rope.{name}", default)
        if not is_real(value):
            raise ParameterError("model", f"must have a number for its rope.{name}; {fields.path} has {value!r}")
        return float(value or default)

    theta, named = number("freq_base", 10_000.0), fields.get(f"{family}.rope.scaling.type", "linear")
    if family == "phi3":
        return _phi3_rope(fields, theta, head_dim, factors)
    if named not in KINDS:
        raise ParameterError("model", f"must have GGUF rope scaling {', '.join(KINDS)}; got {named}")
    context = int(fields.of(family, "context_length"))
    factor = 1.0 if named == "none" else number("scaling.factor", number("scale_linear", 1.0))
    attention = number("scaling.attn_factor", 1.0)
    if named != "yarn" and attention != 1:
        raise ParameterError(
            "model", f"must have rope.scaling.attn_factor 1 without YaRN; {fields.path} has {attention:g}"
        )
    if factors is not None:
        if factor != 1 or named == "yarn" or family != "llama":
            raise ParameterError(
                "model", f"must stretch its rotary embeddings in one way; {fields.path} has factors, too"
            )
        if len(factors) != head_dim // 2 or not (np.isfinite(factors) & (factors > 0)).all():
            raise ParameterError(
                "model",
                f"must have a positive factor for each of its {head_dim // 2} frequencies; {fields.path} has "
                f"{len(factors)}, the least {factors.min(initial=np.inf):g}",
            )
        return Rope(theta=theta, kind="factors", original=context, factors=tuple(factors.tolist()))
    if named != "yarn":
        plain = factor == 1
        return Rope(theta=theta, kind="default" if plain else "linear", factor=factor, original=context)
    # Every value from llama.cpp's converter counts. Its own writer puts the field into every file; its 1 means nothing.
    given = fields.get(f"{family}.rope.scaling.yarn_attn_factor")
    is_converters = float(fields.of(family, "rope.scaling.yarn_ext_factor", 1.0)) >= 0
    scale = float(given) if given is not None and is_converters else temperature(factor)
    return Rope(
        theta=theta,
        kind="yarn",
        factor=factor,
        original=int(number("scaling.original_context_length", context)),
        beta_fast=number("scaling.yarn_beta_fast", 32.0),
        beta_slow=number("scaling.yarn_beta_slow", 1.0),
        attention_factor=scale * attention,
    )


def _phi3_rope(fields: Fields, theta: float, head_dim: int, factors: np.ndarray | None) -> Rope:
    """The rotary embeddings of a Phi-3, with LongRoPE's short factors if the file has them.

    Raises:
      ValueError: there is not one positive factor for each frequency.
    """
    context = int(fields.of("phi3", "context_length"))
    width = int(fields.of("phi3", "rope.dimension_count", head_dim)) or head_dim
    share = width / head_dim
    if factors is None:
        return Rope(theta=theta, original=context, share=share)
    if len(factors) != width // 2 or not (np.isfinite(factors) & (factors > 0)).all():
        raise ParameterError(
            "model", f"must have a positive factor for each of its {width // 2} frequencies; {fields.path} has not"
        )
    original = int(fields.of("phi3", "rope.scaling.original_context_length", context))
    return Rope(
        theta=theta,
        kind="factors",
        original=original,
        attention_factor=float(fields.of("phi3", "rope.scaling.attn_factor", 1.0)),
        factors=tuple(factors.tolist()),
        share=share,
    )


def gemma_parts(fields: Fields, family: str, layers: int, heads: int, hidden: int, head_dim: int) -> dict[str, Any]:
    """What an ``LMConfig`` of Gemma 2 or 3 has beside the fields of all families.

    As in llama.cpp's loader: every sixth layer of Gemma 3, and every second of Gemma 2, attends to all tokens, and the
    models of 27 billion parameters scale their queries by the width per head.

    Raises:
      ValueError: the pattern of the windows is of another form.
    """
    third = family == "gemma3"
    pattern = fields.get(f"{family}.attention.sliding_window_pattern", 6 if third else 2)
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern >= 1:
        slides = [(layer + 1) % pattern != 0 for layer in range(layers)]
    elif isinstance(pattern, list) and len(pattern) == layers:
        slides = [bool(each) for each in pattern]
    else:
        raise ParameterError(
            "model", f"must have a sliding_window_pattern for its {layers} layers; {fields.path} has {pattern!r}"
        )
    window, context = fields.of(family, "attention.sliding_window"), fields.of(family, "context_length")
    large = layers == (62 if third else 46)

    def cap(name: str) -> float | None:
        return float(fields.get(f"{family}.{name}", 0.0)) or None

    local = Rope(theta=float(fields.get(f"{family}.rope.freq_base_swa", 10_000.0)), original=int(context))
    return {
        "activation": "gelu_tanh",
        "windows": tuple(int(window) if each else int(context) for each in slides) if any(slides) else None,
        "local_rope": local if third else None,
        "local": tuple(slides) if third else None,
        "qk_norm": third,
        "norm_offset": True,
        "output_norms": True,
        "embedding_scale": hidden**0.5,
        "attention_scale": (hidden // heads if large else head_dim) ** -0.5,
        "attention_cap": None if third else cap("attn_logit_softcapping"),
        "logit_cap": cap("final_logit_softcapping"),
    }
