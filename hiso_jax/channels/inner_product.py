"""Inner-product manipulation (Xie et al., arXiv 1903.03936): all hostile clients send the negated honest mean."""

import jax
from jaxtyping import Array, Key, PyTree

from hiso_jax.channels._forging import honest_statistics
from hiso_jax.checks import finite
from hiso_jax.fed.algorithm import Attack, Senders


def inner_product(*, attack_scale: float = 10.0) -> Attack:
    """−``attack_scale`` times the honest clients' mean; hostile clients know all other messages.

    Args:
      attack_scale: size of a forged message, relative to the values that it is forged from.

    Raises:
      ValueError: ``attack_scale`` is negative or not finite.
    """
    finite("attack_scale", attack_scale)

    def forge(messages: PyTree, senders: Senders, key: Key[Array, ""]) -> PyTree:
        return jax.tree.map(lambda numbers: -attack_scale * honest_statistics(numbers, senders)[0], messages)

    return Attack(forge, separable=True, label="inner_product.<locals>.forge")
