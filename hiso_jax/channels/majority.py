"""The majority of signs (signSGD with majority vote, Bernstein et al., arXiv 1810.05291)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from hiso_jax.fed.algorithm import Combine, mean


def _majority(messages: PyTree, weights: Float[Array, "C"], key: Array) -> PyTree:
    return jax.tree.map(lambda m: jnp.where(m < 0, -1, 1).astype(m.dtype), mean(messages, weights))


def majority() -> Combine:
    """The sign of the weighted mean; a tie gives 1."""
    return Combine(_majority, separable=True, bits=1, label="_majority")
