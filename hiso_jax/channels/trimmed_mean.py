"""The coordinate-wise trimmed mean (Yin et al., arXiv 1803.01498), without the extremes on either side."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from hiso_jax.channels._shares import most_below
from hiso_jax.checks import fraction
from hiso_jax.fed.algorithm import Combine


def trimmed_mean(*, trim: float = 0.2) -> Combine:
    """The mean of each entry over the C clients that count, without the ⌊trim · C⌋ extremes on either side.

    Args:
      trim: share of the clients left out on either side by trimmed_mean, below one half; weights are ignored.

    Raises:
      ValueError: ``trim`` is outside [0, 0.5).
    """
    fraction("trim", trim, below=0.5)

    def combine(messages: PyTree, weights: Float[Array, "C"], key: Array) -> PyTree:
        counted = (weights > 0).sum()
        cut = most_below(trim, counted, len(weights))

        def one(message: Array) -> Array:
            counts = jnp.expand_dims(weights > 0, range(1, message.ndim))
            # Entries that do not count are sorted to the end.
            ordered = jnp.sort(jnp.where(counts, message, jnp.inf), axis=0)
            place = jnp.expand_dims(jnp.arange(len(weights)), range(1, message.ndim))
            kept = (place >= cut) & (place < counted - cut)
            return jnp.where(kept, ordered, 0).sum(0) / jnp.maximum(counted - 2 * cut, 1).astype(message.dtype)

        return jax.tree.map(one, messages)

    return Combine(combine, separable=True, compares=True, label="trimmed_mean.<locals>.combine")
