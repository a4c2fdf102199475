"""A search for a learning rate that costs every method the same number of runs."""

from collections.abc import Mapping
from typing import Any

# Neighbours of the first rates.
FACTOR = 3.0
FEWEST_TRIES = 3


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def next_rates(tried: Mapping[float, Any], guess: float) -> list[float]:
    """The learning rates to try next: the first three around a guess, then one at a time.

    While the best is the smallest or the largest, the next lies a factor of 3 beyond it; once it is inside, the next is
    the middle, in logarithms, of the wider of the two gaps beside it (of equal ones, of the one with the better end).

    Args:
      tried: rate → its score, the smaller the better; what can be compared with ``<`` will do.
      guess: where to begin.
    """
    if not tried:
        return [_rounded(guess / FACTOR), _rounded(guess), _rounded(guess * FACTOR)]
    listed = sorted(tried)
    best = min(listed, key=lambda rate: tried[rate])
    place = listed.index(best)
    if place == 0:
        return [_rounded(best / FACTOR)]
    if best == listed[-1]:
        return [_rounded(best * FACTOR)]
    below, above = listed[place - 1], listed[place + 1]
    wider_above = above / best > 1.01 * best / below
    wider_below = best / below > 1.01 * above / best
    goes_up = wider_above or (not wider_below and tried[above] < tried[below])
    return [_rounded((best * (above if goes_up else below)) ** 0.5)]
