"""Numbers of messages for a share of a cohort."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int


def least_above(share: float, counted: ArrayLike, clients: int) -> Int[Array, ""]:
    """⌈share · counted⌉, for ``counted`` ≤ ``clients`` messages that count.

    The decimal digits of ``share`` are exact here, because in float32 0.3 · 50 is above 15.
    """
    return _table(share, clients, -1)[counted].astype(jnp.result_type(counted))


def most_below(share: float, counted: ArrayLike, clients: int) -> Int[Array, ""]:
    """⌊share · counted⌋, as exact as :func:`least_above`."""
    return _table(share, clients, 1)[counted].astype(jnp.result_type(counted))


def _table(share: float, clients: int, sign: int) -> Int[Array, "n"]:
    """The integers for 0, 1, …, ``clients`` messages, rounded down (1) or up (-1)."""
    exact = Fraction(str(share))
    numbers = [sign * (sign * exact.numerator * n // exact.denominator) for n in range(clients + 1)]
    return jnp.asarray(np.array(numbers, np.int32))
