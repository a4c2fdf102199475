"""The sign flip: the negated message (Li et al., RSA, arXiv 1811.03761)."""

import jax
from jaxtyping import Array, Key, PyTree

from hiso_jax.checks import finite
from hiso_jax.fed.algorithm import Attack, Senders


def sign_flip(*, attack_scale: float = 10.0) -> Attack:
    """The client's own message times −``attack_scale``.

    Args:
      attack_scale: size of a forged message, relative to the values that it is forged from.

    Raises:
      ValueError: ``attack_scale`` is negative or not finite.
    """
    finite("attack_scale", attack_scale)

    def forge(messages: PyTree, senders: Senders, key: Key[Array, ""]) -> PyTree:
        return jax.tree.map(lambda m: -attack_scale * m, messages)

    return Attack(forge, separable=True, label="sign_flip.<locals>.forge", reads_others=False)
