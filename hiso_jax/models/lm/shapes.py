"""Published architectures by name, to know the costs of a model without its weights."""

from dataclasses import replace

from hiso_jax.models.lm.config import LMConfig, Rope

# Zhang et al., arXiv 2205.01068.
_OPT = LMConfig(
    family="opt",
    vocab_size=50272,
    hidden_size=768,
    embedding_size=768,
    layers=12,
    heads=12,
    kv_heads=12,
    head_dim=64,
    mlp_size=3072,
    gated=False,
    activation="relu",
    rms=False,
    norm_eps=1e-5,
    max_positions=2048,
    learned_positions=2050,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
# Touvron et al., arXiv 2302.13971.
_LLAMA = LMConfig(
    family="llama",
    vocab_size=32000,
    hidden_size=4096,
    embedding_size=4096,
    layers=32,
    heads=32,
    kv_heads=32,
    head_dim=128,
    mlp_size=11008,
    gated=True,
    activation="silu",
    rms=True,
    norm_eps=1e-6,
    max_positions=2048,
    rope=Rope(),
    tied=False,
)


def _opt(layers: int, heads: int, hidden: int) -> LMConfig:
    return replace(
        _OPT,
        hidden_size=hidden,
        embedding_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        mlp_size=4 * hidden,
    )


SHAPES = {
    "opt-125m": _OPT,
    "opt-1.3b": _opt(24, 32, 2048),
    "opt-2.7b": _opt(32, 32, 2560),
    "opt-6.7b": _opt(32, 32, 4096),
    "opt-13b": _opt(40, 40, 5120),
    "opt-30b": _opt(48, 56, 7168),
    "opt-66b": _opt(64, 72, 9216),
    "llama-7b": _LLAMA,
    "llama-13b": replace(
        _LLAMA, hidden_size=5120, embedding_size=5120, layers=40, heads=40, kv_heads=40, mlp_size=13824
    ),
    "smollm2-135m": replace(
        _LLAMA,
        vocab_size=49152,
        hidden_size=576,
        embedding_size=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        mlp_size=1536,
        norm_eps=1e-5,
        max_positions=8192,
        rope=Rope(theta=100_000.0),
        tied=True,
    ),
}
