"""The coordinate-wise median (Yin et al., arXiv 1803.01498): no minority can move it beyond the majority's range."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from hiso_jax.fed.algorithm import Combine


def _median(messages: PyTree, weights: Float[Array, "C"], key: Array) -> PyTree:
    def one(message: Array) -> Array:
        counts = jnp.expand_dims(weights > 0, range(1, message.ndim))
        # If no client counts, the median is NaN and becomes zero, so that no update is applied.
        return jnp.nan_to_num(jnp.nanmedian(jnp.where(counts, message, jnp.nan), axis=0))

    return jax.tree.map(one, messages)


def median() -> Combine:
    """The median of each entry over the clients that count; their weights are ignored."""
    return Combine(_median, separable=True, compares=True, label="_median")
