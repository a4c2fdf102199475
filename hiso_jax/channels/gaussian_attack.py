"""The Gaussian attack: noise in place of a message (Blanchard et al., arXiv 1703.02757)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from hiso_jax.channels._forging import honest_statistics
from hiso_jax.checks import finite
from hiso_jax.fed.algorithm import Attack, Senders


def gaussian_attack(*, attack_scale: float = 10.0) -> Attack:
    """Independent Gaussian values, ``attack_scale`` times as large as the honest values.

    The unit is the root mean square of each entry over the honest clients.

    Args:
      attack_scale: size of a forged message, relative to the values that it is forged from.

    Raises:
      ValueError: ``attack_scale`` is negative or not finite.
    """
    finite("attack_scale", attack_scale)

    def forge(messages: PyTree, senders: Senders, key: Key[Array, ""]) -> PyTree:
        leaves, structure = jax.tree.flatten(messages)

        def one(numbers: Array, key: Key[Array, ""]) -> Array:
            average, spread = honest_statistics(numbers, senders)
            size = attack_scale * jnp.sqrt(jnp.square(average) + jnp.square(spread))
            return size * jax.random.normal(key, numbers.shape, numbers.dtype)

        return jax.tree.unflatten(structure, map(one, leaves, jax.random.split(key, len(leaves))))

    return Attack(forge, separable=True, label="gaussian_attack.<locals>.forge")
