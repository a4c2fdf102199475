"""How many of a cohort's messages a share of them is."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int


def least_above(share: float, counted: ArrayLike, clients: int) -> Int[Array, ""]:
    """⌈share · counted⌉, of ``counted`` ≤ ``clients`` messages that count.

    Of the share as it is written: in float32, 0.3 · 50 is above 15.
    """
    return _table(share, clients, -1)[counted].astype(jnp.result_type(counted))


def most_below(share: float, counted: ArrayLike, clients: int) -> Int[Array, ""]:
    """⌊share · counted⌋, likewise."""
    return _table(share, clients, 1)[counted].astype(jnp.result_type(counted))


def _table(share: float, clients: int, sign: int) -> Int[Array, "n"]:
    """The integers for 0, 1, …, ``clients`` messages, rounded down (1) or up (-1)."""
    exact = Fraction(str(share))
    numbers = [sign * (sign * exact.numerator * n // exact.denominator) for n in range(clients + 1)]
    return jnp.asarray(np.array(numbers, np.int32))
