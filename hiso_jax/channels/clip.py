"""Clipping of messages to a norm (Pascanu et al., arXiv 1211.5063), by the sender or at the server's door."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from hiso_jax.checks import positive
from hiso_jax.fed.algorithm import Send, Senders


def clip(*, clip_norm: float = 1.0) -> Send:
    """Every message shortened to Euclidean length ``clip_norm`` if it is longer.

    Args:
      clip_norm: longest message that clip lets pass, as a Euclidean norm over all its numbers.

    Raises:
      ValueError: ``clip_norm`` not positive and finite.
    """
    positive("clip_norm", clip_norm)

    def send(messages: PyTree, senders: Senders, key: Array) -> PyTree:
        squares = [jnp.square(m).reshape(len(m), -1).sum(1) for m in jax.tree.leaves(messages)]
        norm = jnp.sqrt(sum(squares))
        factor = jnp.where(norm > clip_norm, clip_norm / norm, 1)
        return jax.tree.map(lambda m: m * jnp.expand_dims(factor, range(1, m.ndim)).astype(m.dtype), messages)

    return send
