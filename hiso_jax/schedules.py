"""Schedules by name: the learning rate over the rounds, as in ``--schedule`` and ``Experiment``.

A schedule is a factory ``name(learning_rate, rounds, *, options)`` of the rate at the start and the number of rounds.
It returns a number or a schedule of optax. If the factory takes ``rounds``, the schedule ends there, and its
runs cannot be extended.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from hiso_jax.choices import Kind


def inverse_sqrt(rate: ArrayLike, rounds: float = 100.0) -> Callable[[ArrayLike], Any]:
    """η / √(1 + t / rounds): nearly constant at first, then decaying as stochastic gradient descent requires.

    Args:
      rate: η at the start.
      rounds: the number of rounds after which the rate is η / √2.

    Example:
      >>> from hiso_jax.schedules import inverse_sqrt
      >>> round(float(inverse_sqrt(0.2)(300)), 3)
      0.1
    """
    return lambda count: rate / jnp.sqrt(1 + count / rounds)


def constant(learning_rate: Any) -> Any:
    """The rate itself."""
    return learning_rate


def cosine(learning_rate: Any, rounds: int) -> optax.Schedule:
    """Decays to zero along half a cosine."""
    return optax.cosine_decay_schedule(learning_rate, rounds)


def linear(learning_rate: Any, rounds: int) -> optax.Schedule:
    """Decays to zero along a line."""
    return optax.linear_schedule(learning_rate, 0.0, rounds)


def _inverse_sqrt(learning_rate: Any) -> optax.Schedule:
    """Decays as 1/√(1 + round/100)."""
    return inverse_sqrt(learning_rate)


SCHEDULES = Kind(
    "schedule",
    {"constant": constant, "cosine": cosine, "linear": linear, "inverse-sqrt": _inverse_sqrt},
    ("learning_rate", "rounds"),
    "Schedule",
    is_valid=lambda made: callable(made) or isinstance(made, float | int | np.ndarray | np.generic | jax.Array),
)
