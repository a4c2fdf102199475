"""Checks of numbers: one sentence that begins with the name of the parameter and says what would be valid.

Python's numbers and NumPy's are checked alike. Arrays of JAX pass the checks that say so, since they may be traced.
No library does this: they take a whole float for an integer, or refuse NumPy's integers, or know nothing of tracing.
"""

import numbers
from typing import Any

import jax
import numpy as np


class ParameterError(ValueError):
    """A parameter has a value that it cannot have.

    One structured error lets every caller name the parameter in its own way: Python by its name, the command line as
    the option that set it.

    Args:
      parameter: name of the parameter.
      message: rest of the sentence that the name begins: what would be valid, and the value. It writes the names of
        other parameters in backticks.

    Attributes:
      parameter: name of the parameter.
      message: rest of the sentence.
    """

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(parameter, message)
        self.parameter, self.message = parameter, message

    def __str__(self) -> str:
        """The whole sentence, as Python's users read it."""
        return f"{self.parameter} {self.message}"


def _is_traceable(value: Any) -> bool:
    return isinstance(value, jax.Array)


def is_plain(value: Any) -> bool:
    """Whether ``value`` was written by a user, and is not what JAX puts in its place in a pytree of values."""
    return isinstance(value, str | bytes | numbers.Number | np.generic)


def is_real(value: Any) -> bool:
    """Whether ``value`` is one number, of Python or NumPy, and no truth value."""
    value = value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def is_integer(value: Any) -> bool:
    """Whether ``value`` is one integer, of Python or NumPy, and no truth value."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_)


def integer(name: str, value: Any, minimum: int | None = None, below: int | None = None) -> None:
    """Refuse what is not an integer in [``minimum``, ``below``).

    Raises:
      ParameterError: it is not.
    """
    if not is_integer(value):
        raise ParameterError(name, f"must be a whole number, got {value!r}")
    if minimum is not None and value < minimum:
        raise ParameterError(name, f"must be at least {minimum}, got {value}")
    if below is not None and value >= below:
        raise ParameterError(name, f"must be below {'2^31' if below == 2**31 else below}, got {value}")


def positive(name: str, value: Any) -> None:
    """Refuse what is not a positive finite number; arrays of JAX, which may be traced, pass.

    Raises:
      ParameterError: it is not.
    """
    if not (_is_traceable(value) or (is_real(value) and np.isfinite(value) and value > 0)):
        raise ParameterError(name, f"must be a positive finite number, got {value!r}")


def between(name: str, value: Any, low: float, high: float) -> None:
    """Refuse what is not a number in [low, high]; arrays of JAX, which may be traced, pass.

    Raises:
      ParameterError: it is not.
    """
    if not (_is_traceable(value) or (is_real(value) and low <= value <= high)):
        raise ParameterError(name, f"must be between {low:g} and {high:g}, got {value!r}")


def fraction(name: str, value: Any, below: float = 1.0) -> None:
    """Refuse what is not a number in [0, ``below``); arrays of JAX, which may be traced, pass.

    Raises:
      ParameterError: it is not.
    """
    if not (_is_traceable(value) or (is_real(value) and 0 <= value < below)):
        raise ParameterError(name, f"must be at least 0 and below {below:g}, got {value!r}")


def finite(name: str, value: Any, low: float = 0.0) -> None:
    """Refuse what is not a finite number of at least ``low``; arrays of JAX, which may be traced, pass.

    Raises:
      ParameterError: it is not.
    """
    if not (_is_traceable(value) or (is_real(value) and np.isfinite(value) and value >= low)):
        raise ParameterError(name, f"must be a finite number{f' ≥ {low:g}' if low > -np.inf else ''}, got {value!r}")


def rate(name: str, value: Any) -> None:
    """Refuse a learning rate that is neither a schedule nor a finite number of at least 0; arrays of JAX pass.

    Raises:
      ParameterError: it is neither.
    """
    if not (callable(value) or _is_traceable(value) or (is_real(value) and np.isfinite(value) and value >= 0)):
        raise ParameterError(name, f"must be a finite number ≥ 0 or a schedule over rounds, got {value!r}")


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its name, if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
