"""The architecture of a decoder-only language model: one description for OPT, and the Llama and Gemma families."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hiso_jax.checks import ParameterError, is_integer, is_real
from hiso_jax.models.lm.known import FAMILIES, check_known, check_rope

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "factors"]
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embeddings (Su et al., arXiv 2104.09864), possibly stretched to a longer context.

    Attributes:
      theta: the base of the frequencies.
      kind: default, linear (Chen et al., arXiv 2306.15595), dynamic NTK, llama3, yarn (Peng et al., arXiv
        2309.00071), or factors: each frequency has its own divisor, as in GGUF files of Llama 3 and in LongRoPE.
      factor: the factor by which the context is stretched.
      original: the context length of pre-training, in tokens.
      low_freq_factor, high_freq_factor: options of llama3.
      beta_fast, beta_slow, truncate: options of yarn.
      attention_factor: the scale of the rotated queries and keys (yarn and LongRoPE).
      factors: the divisor of each frequency, for kind factors.
      share: the share of each head that is rotated, its first coordinates (Phi-4-mini: 0.75).
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    factors: tuple[float, ...] = ()
    share: float = 1.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
          ValueError: a value is not a number, or is out of range.
        """
        names = ("theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
        for name in names:
            value = getattr(self, name)
            if not is_real(value) or not 0 < value < float("inf"):
                raise ParameterError("model", f"must have a positive {name} of its rotary embeddings; it has {value!r}")
        if not is_integer(self.original) or not 0 <= self.original <= SIZES["max_positions"]:
            raise ParameterError(
                "model", f"must have an original context of tokens; its configuration has {self.original!r}"
            )
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ParameterError(
                "model",
                "must have a low_freq_factor below the high_freq_factor of its rotary embeddings; it has "
                f"{self.low_freq_factor!r} and {self.high_freq_factor!r}",
            )
        if not is_real(self.share) or not 0 < self.share <= 1:
            raise ParameterError("model", f"must rotate a share of each head of at most 1; it has {self.share!r}")

    def width(self, head_dim: int) -> int:
        """The number of rotated coordinates of a head."""
        return int(head_dim * self.share)


# The largest accepted value of each size. The largest models today have a hundredth of it, or a tenth.
SIZES = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "embedding_size": 2**20,
    "layers": 2**12,
    "heads": 2**14,
    "kv_heads": 2**14,
    "head_dim": 2**14,
    "mlp_size": 2**22,
    "max_positions": 2**27,
    "learned_positions": 2**27,
}


def check_size(name: str, value: Any) -> None:
    """Refuse a size of an architecture that is no model's.

    Raises:
      ParameterError: ``value`` is no integer in the range of ``SIZES[name]``.
    """
    least, most = int(name != "learned_positions"), SIZES[name]
    if not is_integer(value) or not least <= value <= most:
        raise ParameterError("model", f"must have a {name} of {least} to {most:,}; its configuration has {value!r}")


@dataclass(frozen=True, kw_only=True)
class LMConfig:
    """A decoder-only transformer.

    Attributes:
      family: the architecture, as in transformers' ``model_type``; gemma3 is the text model (gemma3_text).
      vocab_size: V.
      hidden_size: H, the width of the residual stream.
      embedding_size: the width of the token embedding; if it is not H (OPT-350M), projections connect the two.
      layers: L.
      heads, kv_heads, head_dim: query heads, key and value heads (fewer in grouped-query attention), their width.
      mlp_size: the width inside the feed-forward network.
      gated: whether the feed-forward network is gated (SwiGLU) or plain.
      activation: relu, gelu, gelu_tanh or silu.
      rms: whether norms are RMSNorm without bias, or LayerNorm.
      norm_eps: ε of the norms.
      norm_first: whether norms come before attention and feed-forward, or after the residual sum (OPT-350M).
      final_norm: whether a norm follows the last layer.
      max_positions: the longest sequence.
      learned_positions: rows of the learned position table (OPT: two more than positions); 0 for rotary embeddings.
      rope: the rotary embeddings; None with learned positions.
      qkv_bias, out_bias, mlp_bias: which projections have a bias.
      tied: whether the head is the token embedding.
      windows: how many tokens back each layer attends; None means that every layer attends to all tokens.
      qk_norm: whether every head's queries and keys pass an RMSNorm before they are rotated (Qwen3, Gemma 3).
      rotated: which layers rotate queries and keys; None means all (SmolLM3 rotates three of four).
      local_rope: the rotary embeddings of the layers ``local``, if they have their own (Gemma 3's with a window).
      local: which layers rotate by ``local_rope``.
      norm_offset: whether norms multiply by 1 + scale, and not by their scale (Gemma).
      output_norms: whether attention and feed-forward outputs pass a norm before they are added (Gemma 2 and 3).
      embedding_scale: the factor of the token embeddings (Gemma: √H).
      attention_scale: the factor of queries times keys; None means 1/√head_dim.
      attention_cap, logit_cap: c of a soft cap c·tanh(x/c) on attention scores and on logits (Gemma 2), or None.
    """

    family: Literal["opt", "llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3", "phi3"]
    vocab_size: int
    hidden_size: int
    embedding_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_size: int
    gated: bool
    activation: Literal["relu", "gelu", "gelu_tanh", "silu"]
    rms: bool
    norm_eps: float
    norm_first: bool = True
    final_norm: bool = True
    max_positions: int
    learned_positions: int = 0
    rope: Rope | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = True
    windows: tuple[int, ...] | None = None
    qk_norm: bool = False
    rotated: tuple[bool, ...] | None = None
    local_rope: Rope | None = None
    local: tuple[bool, ...] | None = None
    norm_offset: bool = False
    output_norms: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None

    def __post_init__(self) -> None:
        """Check the sizes and flags.

        Raises:
          ValueError: a size or ``norm_eps`` is out of range, ``kv_heads`` does not divide ``heads``, or a flag is not a
            bool.
        """
        for name in SIZES:
            check_size(name, getattr(self, name))
        if not is_real(self.norm_eps) or not 0 < self.norm_eps < 1:
            raise ParameterError(
                "model", f"must have a norm_eps between 0 and 1; its configuration has {self.norm_eps!r}"
            )
        if self.heads % self.kv_heads:
            raise ParameterError(
                "model", f"must have heads in groups of {self.kv_heads}; its configuration has {self.heads}"
            )
        for name in ("embedding_scale", "attention_scale", "attention_cap", "logit_cap"):
            value = getattr(self, name)
            if value is not None and (not is_real(value) or not 0 < value < float("inf")):
                raise ParameterError("model", f"must have a positive {name}; its configuration has {value!r}")
        flags = (self.gated, self.rms, self.norm_first, self.final_norm, self.tied, self.norm_offset, self.output_norms)
        if not all(isinstance(flag, bool) for flag in (*flags, self.qkv_bias, self.out_bias, self.mlp_bias)):
            raise ParameterError(
                "model", "must have true or false for its biases, norms and tied embeddings; its configuration does not"
            )


def from_transformers(config: Mapping[str, Any]) -> LMConfig:
    """The architecture that a transformers configuration describes.

    Args:
      config: the result of ``config.to_dict()``, or the contents of a ``config.json``.

    Raises:
      ValueError: the architecture or its variant is not supported, or an unknown entry has a value that is not neutral.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ParameterError("model", f"must be of the architectures {', '.join(FAMILIES)}; got {family}")
    check_known(config)
    return _opt(config) if family == "opt" else _gemma(config) if family in GEMMA else _llama(config)


ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


def _activation(name: str) -> Any:
    if name not in ACTIVATIONS:
        raise ParameterError("model", f"must have one of the activations {', '.join(ACTIVATIONS)}; got {name}")
    return ACTIVATIONS[name]


def _opt(config: Mapping[str, Any]) -> LMConfig:
    if not config.get("layer_norm_elementwise_affine", True):
        raise ParameterError(
            "model", "must have norms with weights; OPT without layer_norm_elementwise_affine is not known"
        )
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    bias, first = config.get("enable_bias", True), config.get("do_layer_norm_before", True)
    return LMConfig(
        family="opt",
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        embedding_size=config.get("word_embed_proj_dim") or hidden,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        mlp_size=config["ffn_dim"],
        gated=False,
        activation=_activation(config.get("activation_function", "relu")),
        rms=False,
        norm_eps=1e-5,
        norm_first=first,
        final_norm=first and not config.get("_remove_final_layer_norm", False),
        max_positions=config["max_position_embeddings"],
        # transformers keeps two rows for padding.
        learned_positions=config["max_position_embeddings"] + 2,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tied=config.get("tie_word_embeddings", True),
    )


def _llama(config: Mapping[str, Any]) -> LMConfig:
    family, hidden, heads = config["model_type"], config["hidden_size"], config["num_attention_heads"]
    layers, max_positions = config["num_hidden_layers"], config["max_position_embeddings"]
    biased = family in ("llama", "qwen3", "smollm3") and config.get("attention_bias", False)
    rope = _rope(config, max_positions)
    return LMConfig(
        # Ministral is a Mistral whose configuration says for each layer whether it has a sliding window.
        family="mistral" if family == "ministral" else family,
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        embedding_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        # Qwen3's configuration has its own default.
        head_dim=config.get("head_dim") or (128 if family == "qwen3" else hidden // heads),
        mlp_size=config["intermediate_size"],
        gated=True,
        activation=_activation(config.get("hidden_act", "silu")),
        rms=True,
        norm_eps=config["rms_norm_eps"],
        # LongRoPE rotates longer sequences by other factors; here every sequence has those of the original context.
        max_positions=rope.original if rope.kind == "factors" else max_positions,
        rope=rope,
        qkv_bias=family == "qwen2" or biased,
        out_bias=biased,
        mlp_bias=family in ("llama", "smollm3") and config.get("mlp_bias", False),
        tied=config.get("tie_word_embeddings", family == "smollm3"),
        windows=_windows(config, layers),
        qk_norm=family == "qwen3",
        rotated=_rotated(config, layers) if family == "smollm3" else None,
    )


# transformers' names of Gemma's text models, and ours.
GEMMA: dict[str, Any] = {"gemma2": "gemma2", "gemma3_text": "gemma3"}


def _gemma(config: Mapping[str, Any]) -> LMConfig:
    family, hidden, heads = GEMMA[config["model_type"]], config["hidden_size"], config["num_attention_heads"]
    layers, max_positions = config["num_hidden_layers"], config["max_position_embeddings"]
    biased, third = config.get("attention_bias", False), family == "gemma3"
    ropes = [_rope(_of_layers(config, kind), max_positions) for kind in (FULL, SLIDING)]
    return LMConfig(
        family=family,
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        embedding_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or 256,
        mlp_size=config["intermediate_size"],
        gated=True,
        activation=_activation(config.get("hidden_activation") or "gelu_pytorch_tanh"),
        rms=True,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        max_positions=max_positions,
        rope=ropes[0],
        local_rope=ropes[1] if third else None,
        local=tuple(_sliding(config, layers)) if third else None,
        qkv_bias=biased,
        out_bias=biased,
        tied=config.get("tie_word_embeddings", True),
        windows=_windows(config, layers),
        qk_norm=third,
        norm_offset=True,
        output_norms=True,
        embedding_scale=hidden**0.5,
        attention_scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
        # transformers' Gemma 3 reads no cap of its attention scores.
        attention_cap=None if third else config.get("attn_logit_softcapping"),
        logit_cap=config.get("final_logit_softcapping"),
    )


def _of_layers(config: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The configuration with the rotary embeddings of the layers of one kind, FULL or SLIDING (Gemma 3)."""
    given = config.get("rope_parameters")
    if isinstance(given, Mapping) and kind in given:
        return {**config, "rope_parameters": given[kind]}
    if config["model_type"] == "gemma2":
        return config
    # transformers 4.5x: one base for each kind of layers, and a scaling of the layers without a window.
    if kind == FULL:
        return {**config, "rope_theta": config.get("rope_theta", 1_000_000.0)}
    return {**config, "rope_theta": config.get("rope_local_base_freq", 10_000.0), "rope_scaling": None}


def _rotated(config: Mapping[str, Any], layers: int) -> tuple[bool, ...] | None:
    """Which layers of a SmolLM3 rotate; its entry ``no_rope_layers`` has 1 for those that do."""
    given, every = config.get("no_rope_layers"), config.get("no_rope_layer_interval", 4)
    if given is None:
        if not is_integer(every) or every < 1:
            raise ParameterError(
                "model", f"must have a no_rope_layer_interval of at least 1; its configuration has {every!r}"
            )
        given = [int((layer + 1) % every != 0) for layer in range(layers)]
    if not isinstance(given, list | tuple) or len(given) != layers or any(each not in (0, 1) for each in given):
        raise ParameterError(
            "model",
            f"must have no_rope_layers of 0 or 1 for each of its {layers} layers; its configuration has "
            f"{str(given)[:80]}",
        )
    return None if all(given) else tuple(map(bool, given))


FULL, SLIDING = "full_attention", "sliding_attention"
# transformers 4.5x wrote "attention" for full attention.
LAYER_TYPES = {FULL: FULL, "attention": FULL, SLIDING: SLIDING}


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int, ...] | None:
    """The attention window of each layer."""
    slides = _sliding(config, layers)
    if not any(slides):
        return None
    return tuple(int(config["sliding_window"]) if each else config["max_position_embeddings"] for each in slides)


def _sliding(config: Mapping[str, Any], layers: int) -> list[bool]:
    """Which layers have a sliding window, from ``layer_types`` or from the older entries."""
    family, window = config["model_type"], config.get("sliding_window")
    qwen = family in ("qwen2", "qwen3")
    if family == "llama" or ((qwen or family == "smollm3") and not config.get("use_sliding_window", False)):
        window = None
    if window is not None and (not is_integer(window) or window < 1):
        raise ParameterError(
            "model", f"must have a sliding_window of at least one token; its configuration has {window!r}"
        )
    types = config.get("layer_types")
    if types is None or family == "llama":
        full = config.get("max_window_layers", layers) if qwen else 0
        near = [layer >= full for layer in range(layers)]
        if family in GEMMA:
            every = config.get("sliding_window_pattern", 2 if family == "gemma2" else 6)
            near = [(layer + 1) % every != 0 for layer in range(layers)]
        if family == "smollm3":
            # Its windows are those of the layers that do not rotate.
            near = [not each for each in _rotated(config, layers) or [True] * layers]
        types = [SLIDING if window is not None and each else FULL for each in near]
    if not isinstance(types, list | tuple) or len(types) != layers or any(each not in LAYER_TYPES for each in types):
        raise ParameterError(
            "model",
            f"must have layer_types of {' or '.join(LAYER_TYPES)} for each of its {layers} layers; its "
            f"configuration has {str(types)[:80]}",
        )
    slides = [LAYER_TYPES[each] == SLIDING for each in types]
    if window is None and any(slides):
        raise ParameterError("model", "must have a sliding_window for its layers of sliding_attention; it has none")
    return slides


def _rope(config: Mapping[str, Any], max_positions: int) -> Rope:
    # transformers 5 has all entries under rope_parameters; earlier versions have the variant under rope_scaling.
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in given.values()):
        raise ParameterError(
            "model", "must have the same rotary embeddings in all layers; its configuration names several"
        )
    theta = float(given.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    kind: Any = given.get("rope_type") or given.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise ParameterError("model", f"must have rotary embeddings of the kinds {', '.join(ROPE_KINDS)}; got {kind}")
    share = given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) or 1.0
    phi = config["model_type"] == "phi3"
    if share != 1.0 and not phi:
        raise ParameterError("model", "must rotate whole heads; partial_rotary_factor is known of phi3 alone")
    if (kind == "longrope") != (phi and kind != "default"):
        raise ParameterError(
            "model", f"must have rotary embeddings of its family; {config['model_type']} with {kind} is not known"
        )
    check_rope(kind, given)
    original = given.get("original_max_position_embeddings") or max_positions
    if kind in ("llama3", "yarn") and config.get("original_max_position_embeddings"):
        # In transformers the model's entry takes precedence over the entry of its embeddings.
        original = config["original_max_position_embeddings"]
    if kind == "default":
        return Rope(theta=theta, original=int(original), share=share)
    if kind == "longrope":
        return _longrope(config, given, theta, share)
    if kind == "yarn" and "factor" in given and given["factor"] is None:
        given["factor"] = max_positions / original
    needed = ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",)
    for name in needed:
        if given.get(name) is None:
            raise ParameterError(
                "model", f"must have a {name} of its rotary embeddings of the kind {kind}; it has none"
            )
    numbers: dict[str, Any] = {name: float(given[name]) for name in needed}
    if kind == "yarn":
        betas = {name: float(given[name]) for name in ("beta_fast", "beta_slow") if given.get(name)}
        # In transformers null means False, and a missing entry means True.
        numbers |= betas | {"truncate": bool(given.get("truncate", True))}
        numbers["attention_factor"] = _attention_factor(given, numbers["factor"])
    # Dynamic scaling begins where the model's positions end, whatever its original context is.
    return Rope(theta=theta, kind=kind, original=int(max_positions if kind == "dynamic" else original), **numbers)


def _longrope(config: Mapping[str, Any], given: Mapping[str, Any], theta: float, share: float) -> Rope:
    """LongRoPE (Ding et al., arXiv 2402.13753) within the context of pre-training, whose factors are the short ones."""
    original = given.get("original_max_position_embeddings") or config["original_max_position_embeddings"]
    factors, scale = given["short_factor"], given.get("attention_factor")
    stretch = given.get("factor") or config["max_position_embeddings"] / original
    if scale is None:
        scale = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    if not isinstance(factors, list | tuple) or not all(is_real(each) and each > 0 for each in factors):
        raise ParameterError("model", f"must have positive short_factor of LongRoPE; it has {str(factors)[:60]}")
    return Rope(
        theta=theta,
        kind="factors",
        original=int(original),
        attention_factor=float(scale),
        factors=tuple(map(float, factors)),
        share=share,
    )


def temperature(factor: float, scale: float = 1.0) -> float:
    """YaRN's scale of rotated queries and keys for a context stretched by ``factor`` (arXiv 2309.00071, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _attention_factor(given: Mapping[str, Any], factor: float) -> float:
    """The attention factor of the configuration, by default YaRN's temperature."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    top, bottom = given.get("mscale"), given.get("mscale_all_dim")
    return temperature(factor, top) / temperature(factor, bottom) if top and bottom else temperature(factor)
