"""One bit for each entry: its sign (signSGD, Bernstein et al., arXiv 1802.04434)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from hiso_jax.fed.algorithm import Send, Senders


def _signs(messages: PyTree, senders: Senders, key: Array) -> PyTree:
    return jax.tree.map(lambda m: jnp.where(m < 0, -1, 1).astype(m.dtype), messages)


def signs() -> Send:
    """−1 for a negative entry, else 1."""
    return Send(_signs, separable=True, bits=1, label="_signs")
