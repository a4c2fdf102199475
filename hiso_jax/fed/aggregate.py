"""Many clients' scalars → one: aggregates of a cohort, of the shape ``(scalars, valid) → [K, P]``."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Aggregate = Callable[[Float[Array, "C K P"], Bool[Array, "C"]], Float[Array, "K P"]]


def mean(scalars: Float[Array, "C K P"], valid: Bool[Array, "C"]) -> Float[Array, "K P"]:
    """The mean over the valid clients (HiSo, Algorithm 1); zero if there is none."""
    kept = jnp.where(valid[:, None, None], scalars, 0)
    return kept.sum(0) / jnp.maximum(valid.sum(), 1).astype(scalars.dtype)
