"""Clipping of messages to a fixed norm by the server (Pascanu et al., arXiv 1211.5063)."""

from jaxtyping import Array, Float, PyTree

from hiso_jax.checks import positive
from hiso_jax.fed.algorithm import Clip
from hiso_jax.fed.norms import shortening


def clip(*, clip_norm: float = 1.0) -> Clip:
    """Messages clipped to Euclidean length ``clip_norm``.

    Args:
      clip_norm: largest Euclidean norm, over all entries of a message, that is not clipped.

    Raises:
      ValueError: ``clip_norm`` is not positive and finite.
    """
    positive("clip_norm", clip_norm)

    def factors(messages: PyTree, weights: Float[Array, "C"]) -> Float[Array, "C"]:
        return shortening(messages, weights > 0, clip_norm)

    return Clip(factors, label=f"clip({clip_norm!r})")
