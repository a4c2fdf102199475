"""Krum (Blanchard et al., arXiv 1703.02757): the message that is nearest to its neighbours."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from hiso_jax.channels._comparing import krum_scores
from hiso_jax.checks import fraction
from hiso_jax.fed.algorithm import Combine


def krum(*, hostile: float = 0.3) -> Combine:
    """The message whose squared distances to its nearest peers have the smallest sum.

    The cost grows with the square of the cohort up to 512 clients. In larger cohorts each message is compared with 128
    clients drawn in the round, and the cost is linear.

    Args:
      hostile: share of a cohort that krum and multi_krum take to be hostile, below one half.

    Raises:
      ValueError: ``hostile`` is outside [0, 0.5).
    """
    fraction("hostile", hostile, below=0.5)

    def combine(messages: PyTree, weights: Float[Array, "C"], key: Key[Array, ""]) -> PyTree:
        counts = weights > 0
        best = jnp.argmin(krum_scores(messages, counts, hostile, key))
        # If no client counts, the aggregate is zero.
        return jax.tree.map(lambda m: jnp.where(counts[best], m[best], 0).astype(m.dtype), messages)

    return Combine(combine, compares=True, label="krum.<locals>.combine")
