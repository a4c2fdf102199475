"""Rotary position embeddings (Su et al., arXiv 2104.09864) and their stretched variants."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hiso_jax.models.lm.config import Rope


def frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, "head_dim/2"]:
    """The angle per position of each pair of coordinates, in radians; for ``dynamic``, before it adapts."""
    head_dim = rope.width(head_dim)
    powers = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    plain = 1.0 / rope.theta**powers
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, plain, head_dim)
    if rope.kind == "factors":
        return plain / np.asarray(rope.factors)
    return plain


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Llama 3.1's frequencies: long wavelengths are divided by the factor, short wavelengths kept, a ramp between."""
    turns = rope.original * plain / (2 * math.pi)
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(ramp, 0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn(rope: Rope, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """YaRN's ramp over the dimensions (arXiv 2309.00071, section 3.2)."""

    def dimension_of(turns: float) -> float:
        return head_dim * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (np.arange(head_dim // 2) - low) / max(high - low, 0.001)
    stretched = np.clip(ramp, 0, 1)
    return (1 - stretched) * plain + stretched * plain / rope.factor


def rotations(
    rope: Rope, head_dim: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """Cosines and sines of every position, float32; 2·D coordinates of a head are rotated."""
    angle = jnp.asarray(frequencies(rope, head_dim), jnp.float32)
    if rope.kind == "dynamic":
        # The base grows with the sequence once the sequence is longer than in pre-training (NTK-aware scaling).
        length = jnp.maximum(positions.max() + 1, rope.original).astype(jnp.float32)
        growth = rope.factor * length / rope.original - (rope.factor - 1)
        base = rope.theta * growth ** (head_dim / (head_dim - 2))
        angle = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * angle
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(
    x: Float[Array, "B T N head_dim"], cos: Float[Array, "B T D"], sin: Float[Array, "B T D"]
) -> Float[Array, "B T N head_dim"]:
    """Every head, rotated by its position; coordinates i and i + D are a pair, those after 2·D stay."""
    width = 2 * cos.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
    return jnp.concatenate([turned, kept], -1) if kept.size else turned
