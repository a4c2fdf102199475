"""Colluding clients within the spread of honest messages (A Little Is Enough, Baruch et al., arXiv 1902.06156)."""

import jax
from jaxtyping import Array, Key, PyTree

from hiso_jax.channels._forging import honest_statistics
from hiso_jax.checks import finite
from hiso_jax.fed.algorithm import Attack, Senders


def colluding(*, deviations: float = 1.5) -> Attack:
    """All hostile clients send the honest mean minus ``deviations`` standard deviations, entry by entry.

    An honest client might have sent the same entries, so no rule that looks for outliers finds them.

    Args:
      deviations: distance of the forged message from the honest mean, in standard deviations.

    Raises:
      ValueError: ``deviations`` is negative or not finite.
    """
    finite("deviations", deviations)

    def forge(messages: PyTree, senders: Senders, key: Key[Array, ""]) -> PyTree:
        def one(numbers: Array) -> Array:
            average, spread = honest_statistics(numbers, senders)
            return average - deviations * spread

        return jax.tree.map(one, messages)

    return Attack(forge, separable=True, label="colluding.<locals>.forge")
