"""A search for a learning rate that costs every method the same number of runs."""

import math
from collections.abc import Mapping
from typing import Any

# Neighbours of the first rates.
FACTOR = 3.0
FEWEST_TRIES = 3


# Significant digits of a rate, and the most of them, where three do not tell it from the rates that were tried.
DIGITS, MOST_DIGITS = 3, 17


def _rounded(rate: float, tried: Mapping[float, Any]) -> list[float]:
    """``rate`` in as few digits as tell it from those that were ``tried``, three or more; none where no digits do."""
    for digits in range(DIGITS, MOST_DIGITS + 1):
        short = float(f"{rate:.{digits}g}")
        if short not in tried:
            return [short] if 0 < short < math.inf else []
    return []


def next_rates(tried: Mapping[float, Any], guess: float) -> list[float]:
    """The learning rates to try next: the first three around a guess, then one at a time.

    While the best is the smallest or the largest, the next lies a factor of 3 beyond it; once it is inside, the next is
    the middle, in logarithms, of the wider of the two gaps beside it (of equal ones, of the one with the better end).
    No rate that was tried is returned again, so that a search of any number of tries ends.

    Args:
      tried: rate → its score, the smaller the better; what can be compared with ``<`` will do.
      guess: where to begin.

    Returns:
      The rates; none where floating-point numbers leave nothing between the best and its neighbours.
    """
    if not tried:
        return [rate for factor in (1 / FACTOR, 1, FACTOR) for rate in _rounded(guess * factor, tried)]
    listed = sorted(tried)
    best = min(listed, key=lambda rate: tried[rate])
    place = listed.index(best)
    if place == 0:
        return _rounded(best / FACTOR, tried)
    if best == listed[-1]:
        return _rounded(best * FACTOR, tried)
    below, above = listed[place - 1], listed[place + 1]
    wider_above = above / best > 1.01 * best / below
    wider_below = best / below > 1.01 * above / best
    goes_up = wider_above or (not wider_below and tried[above] < tried[below])
    return _rounded((best * (above if goes_up else below)) ** 0.5, tried)
