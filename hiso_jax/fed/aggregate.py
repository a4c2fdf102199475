"""Many clients' scalars → one: aggregates of a cohort, of the shape ``(scalars, weights) → [K, P]``."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

Aggregate = Callable[[Float[Array, "C K P"], Float[Array, "C"]], Float[Array, "K P"]]


def mean(scalars: Float[Array, "C K P"], weights: Float[Array, "C"]) -> Float[Array, "K P"]:
    """The weighted mean over the clients of positive weight (HiSo, Algorithm 1); zero if there is none.

    Args:
      scalars: of every client of the cohort; those of weight zero may be anything, NaN too.
      weights: zero for a client that does not count.
    """
    counted = jnp.where(weights[:, None, None] > 0, scalars * weights[:, None, None], 0)
    total = weights.sum()
    return counted.sum(0) / jnp.where(total > 0, total, 1)
