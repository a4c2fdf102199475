"""Multi-Krum (Blanchard et al., arXiv 1703.02757): the mean of the messages nearest to their neighbours."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from hiso_jax.channels._comparing import krum_scores
from hiso_jax.channels._shares import least_above
from hiso_jax.checks import fraction
from hiso_jax.fed.algorithm import Combine, mean


def multi_krum(*, hostile: float = 0.3) -> Combine:
    """The mean of the n − ⌈hostile · n⌉ messages with the smallest Krum scores, out of n that count.

    The cost of a round grows like that of krum.

    Args:
      hostile: share of a cohort that krum and multi_krum take to be hostile, below one half.

    Raises:
      ValueError: ``hostile`` is outside [0, 0.5).
    """
    fraction("hostile", hostile, below=0.5)

    def combine(messages: PyTree, weights: Float[Array, "C"], key: Key[Array, ""]) -> PyTree:
        counts = weights > 0
        scores, total = krum_scores(messages, counts, hostile, key), counts.sum()
        kept = jnp.maximum(total - least_above(hostile, total, len(counts)), 1)
        rank = jnp.argsort(jnp.argsort(scores))
        return mean(messages, (counts & (rank < kept)).astype(weights.dtype))

    return Combine(combine, compares=True, label="multi_krum.<locals>.combine")
