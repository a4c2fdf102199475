"""A search for a learning rate that costs every method the same number of runs."""

import math
from collections.abc import Mapping
from typing import Any

# The ratio between the first rates, and between the best rate and the next rate beyond it.
FACTOR = 3.0
FEWEST_TRIES = 3


# Significant digits of a rate, and the most of them, if three do not distinguish it from the rates that were tried.
DIGITS, MOST_DIGITS = 3, 17


def _rounded(rate: float, tried: Mapping[float, Any]) -> list[float]:
    """``rate`` in the fewest digits, three or more, that distinguish it from the ``tried`` rates; empty if none do."""
    for digits in range(DIGITS, MOST_DIGITS + 1):
        short = float(f"{rate:.{digits}g}")
        if short not in tried:
            return [short] if 0 < short < math.inf else []
    return []


def next_rates(tried: Mapping[float, Any], guess: float) -> list[float]:
    """The learning rates to try next: the first three around a guess, then one at a time.

    While the best rate is the smallest or the largest, the next rate lies a factor of 3 beyond it. Once the best lies
    inside, the next rate is the middle, in logarithms, of the wider gap beside it; if both gaps are equal, of the gap
    with the better end. No tried rate is returned again, so a search of any number of tries ends.

    Args:
      tried: rate → its score; smaller is better, and scores need only compare with ``<``.
      guess: the rate to begin with.

    Returns:
      The rates; empty if no floating-point number is left between the best rate and its neighbours.
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
