"""Initial weights whose programs compile fast."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key

# Standard deviation of a standard normal truncated to ±2.
TRUNCATED = 0.87962566103423978


def lecun_normal(
    key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike = jnp.float32, out_sharding: Any = None
) -> Array:
    """The bits of ``jax.nn.initializers.lecun_normal()``, drawn as a flat array: XLA compiles it in half the time."""
    deviation = jnp.sqrt(jnp.array(1.0 / math.prod(shape[:-1]), dtype)) / jnp.array(TRUNCATED, dtype)
    flat = jax.random.truncated_normal(key, -2, 2, (math.prod(shape),), dtype)
    return flat.reshape(shape) * deviation
