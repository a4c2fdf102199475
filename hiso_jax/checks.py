"""Checks of numbers: one sentence that begins with the name of the parameter and says what would be valid."""

import math
from typing import Any


def at_least(name: str, value: float, minimum: float) -> None:
    """Refuse a value below ``minimum``.

    Raises:
      ValueError: it is.
    """
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def positive(name: str, value: float) -> None:
    """Refuse a value that is not a positive finite number.

    Raises:
      ValueError: it is not.
    """
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive finite number, got {value}")


def between(name: str, value: Any, low: float, high: float) -> None:
    """Refuse a plain number outside [low, high]; arrays, which may be traced, pass.

    Raises:
      ValueError: it is outside.
    """
    if isinstance(value, int | float) and not low <= value <= high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, got {value}")


def fraction(name: str, value: Any, below: float = 1.0) -> None:
    """Refuse a plain number outside [0, ``below``); arrays, which may be traced, pass.

    Raises:
      ValueError: it is outside.
    """
    if isinstance(value, int | float) and not 0 <= value < below:
        raise ValueError(f"{name} must be at least 0 and below {below:g}, got {value}")


def finite(name: str, value: Any, low: float = 0.0) -> None:
    """Refuse a plain number that is not finite or below ``low``; arrays, which may be traced, pass.

    Raises:
      ValueError: it is.
    """
    if isinstance(value, int | float) and not (math.isfinite(value) and value >= low):
        raise ValueError(f"{name} must be a finite number ≥ {low:g}, got {value}")
