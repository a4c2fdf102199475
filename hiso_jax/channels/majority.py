"""The majority of signs (signSGD with majority vote, Bernstein et al., arXiv 1810.05291)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from hiso_jax.fed.algorithm import Combine, in_bits, mean, separable


@in_bits(1)
@separable
def _majority(messages: PyTree, weights: Float[Array, "C"], key: Array) -> PyTree:
    return jax.tree.map(lambda m: jnp.where(m < 0, -1, 1).astype(m.dtype), mean(messages, weights))


def majority() -> Combine:
    """The sign of the weighted mean; a tie is 1."""
    return _majority
