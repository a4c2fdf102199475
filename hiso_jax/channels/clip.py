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
        rows = jnp.concatenate([m.reshape(len(m), -1) for m in jax.tree.leaves(messages)], axis=1)
        # In units of the largest, whose square may be beyond what a float holds.
        largest = jnp.abs(rows).max(1)
        unit = jnp.where(largest > 0, largest, 1)
        length = jnp.linalg.norm(rows / unit[:, None], axis=1)
        too_long = length > clip_norm / unit

        def shorten(message: Array) -> Array:
            own = tuple(jnp.expand_dims(x, range(1, message.ndim)) for x in (too_long, unit, length))
            return jnp.where(own[0], message / own[1] * (clip_norm / own[2]), message).astype(message.dtype)

        return jax.tree.map(shorten, messages)

    return send
