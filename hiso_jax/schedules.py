"""Learning rates over rounds that optax does not have."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike


def inverse_sqrt(rate: ArrayLike, rounds: float = 100.0) -> Callable[[ArrayLike], Any]:
    """η / √(1 + t / rounds): nearly constant at first, and then as stochastic gradient descent wants it.

    Args:
      rate: η at the start.
      rounds: after so many it is η / √2.

    Example:
      >>> from hiso_jax.schedules import inverse_sqrt
      >>> round(float(inverse_sqrt(0.2)(300)), 3)
      0.1
    """
    return lambda count: rate / jnp.sqrt(1 + count / rounds)
