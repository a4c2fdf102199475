"""Messages clipped to their median length (as in Andrew et al., arXiv 1905.03871).

φ_i = min(1, m / R_i), where R_i is the root mean square of client i's entries and m the lower median of R over the
clients that count and do not send only zeros. At any scale half of the messages are clipped, so a client with a steeper
loss than the others no longer decides the round.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from hiso_jax.fed.algorithm import Clip
from hiso_jax.fed.norms import kinds, lengths, middle, to_length


def clipping_factors(messages: PyTree, weights: Float[Array, "C"]) -> Float[Array, "C"]:
    """φ of every client; 1 if no client counts."""
    counts = weights > 0
    own = [lengths(each, counts) for each in kinds(messages)]
    return jnp.stack([to_length(each, middle(each, counts)) for each in own]).min(0)


def clip_to_median() -> Clip:
    """Messages clipped to their median length."""
    return Clip(clipping_factors, label="clip_to_median")
