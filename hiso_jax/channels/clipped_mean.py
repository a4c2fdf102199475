"""The weighted mean of messages clipped to their median length (as in Andrew et al., arXiv 1905.03871).

φ_i = min(1, m / R_i), R_i the root mean square of client i's numbers, m the lower median of R over the clients that
count; ĝ = Σ_i w_i φ_i g_i / Σ_i w_i. Half of the clients are shortened, whatever the scale: a client whose loss is
steeper than the others' no longer decides the round.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from hiso_jax.fed.algorithm import RescaledMean
from hiso_jax.fed.codes import by_message, root_mean_square
from hiso_jax.zo import slopes


def clipping_factors(messages: PyTree, weights: Float[Array, "C"]) -> Float[Array, "C"]:
    """φ of every client; 1 if none counts."""
    rows = jnp.concatenate([m.reshape(len(m), -1) for m in jax.tree.leaves(slopes(messages))], axis=1)
    # A message that does not count may be anything.
    lengths = by_message(root_mean_square, jnp.where(weights[:, None] > 0, rows, 0))
    counted = (weights > 0).sum()
    ordered = jnp.sort(jnp.where(weights > 0, lengths, jnp.inf))
    middle = ordered[jnp.maximum(counted - 1, 0) // 2]
    return jnp.where(lengths > middle, middle / jnp.where(lengths > 0, lengths, 1), 1)


def clipped_mean() -> RescaledMean:
    """The mean of messages no longer than their median length."""
    return RescaledMean(clipping_factors)
