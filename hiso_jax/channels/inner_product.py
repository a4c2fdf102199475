"""Inner-product manipulation (Xie et al., arXiv 1903.03936): the opposite of what the honest say, from all hostile."""

import jax
from jaxtyping import Array, Key, PyTree

from hiso_jax.channels._forging import honest_statistics
from hiso_jax.checks import finite
from hiso_jax.fed.algorithm import Attack, Senders


def inner_product(*, attack_scale: float = 10.0) -> Attack:
    """−``attack_scale`` times the honest clients' mean; the hostile know what all the others send.

    Args:
      attack_scale: how much larger a forged message is than what it is forged from.

    Raises:
      ValueError: ``attack_scale`` negative or not finite.
    """
    finite("attack_scale", attack_scale)

    def forge(messages: PyTree, senders: Senders, key: Key[Array, ""]) -> PyTree:
        return jax.tree.map(lambda numbers: -attack_scale * honest_statistics(numbers, senders)[0], messages)

    return Attack(forge, separable=True, label="inner_product.<locals>.forge")
