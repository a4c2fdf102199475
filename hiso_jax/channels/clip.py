"""Clipping of messages to a fixed norm at the server's door (Pascanu et al., arXiv 1211.5063)."""

from jaxtyping import Array, Float, PyTree

from hiso_jax.checks import positive
from hiso_jax.fed.algorithm import Rescale
from hiso_jax.fed.norms import shortening


def clip(*, clip_norm: float = 1.0) -> Rescale:
    """Every message shortened to Euclidean length ``clip_norm`` if it is longer.

    Args:
      clip_norm: longest message that passes as it is, as a Euclidean norm over all its numbers.

    Raises:
      ValueError: ``clip_norm`` not positive and finite.
    """
    positive("clip_norm", clip_norm)

    def factors(messages: PyTree, weights: Float[Array, "C"], state: PyTree) -> tuple[Float[Array, "C"], PyTree]:
        return shortening(messages, weights > 0, clip_norm), state

    return Rescale(factors, label=f"clip({clip_norm!r})")
