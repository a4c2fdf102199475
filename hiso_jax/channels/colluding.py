"""Colluders who stay within the crowd (A Little Is Enough, Baruch et al., arXiv 1902.06156)."""

import jax
from jaxtyping import Array, Key, PyTree

from hiso_jax.channels._forging import honest_statistics
from hiso_jax.checks import finite
from hiso_jax.fed.algorithm import Attack, Senders


def colluding(*, deviations: float = 1.5) -> Attack:
    """All hostile clients send the honest mean less ``deviations`` of its standard deviations, number by number.

    Every number is one that an honest client might have sent, so that no rule that looks for outliers finds it.

    Args:
      deviations: how far from the honest mean colluders say they are.

    Raises:
      ValueError: ``deviations`` negative or not finite.
    """
    finite("deviations", deviations)

    def forge(messages: PyTree, senders: Senders, key: Key[Array, ""]) -> PyTree:
        def one(numbers: Array) -> Array:
            average, spread = honest_statistics(numbers, senders)
            return average - deviations * spread

        return jax.tree.map(one, messages)

    return Attack(forge, separable=True, label="colluding.<locals>.forge")
