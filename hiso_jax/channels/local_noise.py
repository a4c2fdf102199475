"""Local differential privacy: every client clips its own message and adds noise before it sends (arXiv 1610.05492)."""

import jax
from jaxtyping import Array, Key, PyTree

from hiso_jax.checks import finite, positive
from hiso_jax.fed.algorithm import Noise, Send, Senders
from hiso_jax.fed.norms import shortening


def local_noise(*, clip_norm: float = 1.0, noise_multiplier: float = 1.0) -> Send:
    """Messages clipped to a fixed norm, each with its own noise, so that not even the server sees a true message.

    Args:
      clip_norm: largest Euclidean norm, over all entries of a message, that is not clipped.
      noise_multiplier: standard deviation of the noise on every entry of a message, in units of clip_norm.

    Raises:
      ValueError: ``clip_norm`` is not positive, ``noise_multiplier`` is negative, or either is not finite.
    """
    positive("clip_norm", clip_norm)
    finite("noise_multiplier", noise_multiplier)
    noise = Noise(clip_norm, noise_multiplier)
    deviation = noise_multiplier * clip_norm

    def send(messages: PyTree, senders: Senders, key: Key[Array, ""]) -> PyTree:
        factors = shortening(messages, senders.client_ids >= 0, clip_norm)
        leaves, structure = jax.tree.flatten(messages)

        def one(message: Array, key: Key[Array, ""]) -> Array:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, senders.client_ids)
            drawn = jax.vmap(lambda k: jax.random.normal(k, message.shape[1:], message.dtype))(keys)
            return message * factors.reshape(-1, *[1] * (message.ndim - 1)) + deviation * drawn

        return jax.tree.unflatten(structure, map(one, leaves, jax.random.split(key, len(leaves))))

    return Send(send, noise=noise, label=f"local_noise.<locals>.send{(clip_norm, noise_multiplier)!r}")
