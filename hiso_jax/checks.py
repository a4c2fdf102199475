"""Checks of numbers; an error is one sentence that begins with the parameter's name and says which values are valid.

Numbers of Python and of NumPy are checked the same way. Arrays of JAX pass the checks that say so, because they may be
traced. No library does this: libraries accept an integral float as an integer, or refuse NumPy's integers, or do not
support tracing.
"""

import numbers
from typing import Any

import jax
import numpy as np


class ParameterError(ValueError):
    """A parameter has an invalid value.

    One structured error lets every caller name the parameter in its own way: Python by its name, the command line as
    the option that set it.

    Args:
      parameter: name of the parameter.
      message: rest of the sentence after the name: the valid values, and the given value. The names of other
        parameters are in backticks.

    Attributes:
      parameter: name of the parameter.
      message: rest of the sentence.
    """

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(parameter, message)
        self.parameter, self.message = parameter, message

    def __str__(self) -> str:
        """The complete sentence, as users of Python read it."""
        return f"{self.parameter} {self.message}"


def _is_traceable(value: Any) -> bool:
    return isinstance(value, jax.Array)


def is_plain(value: Any) -> bool:
    """Whether ``value`` is a string, bytes or number of a user, and not JAX's substitute for it in a pytree."""
    return isinstance(value, str | bytes | numbers.Number | np.generic)


def is_real(value: Any) -> bool:
    """Whether ``value`` is one real number of Python or NumPy, and not a bool."""
    value = value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def is_integer(value: Any) -> bool:
    """Whether ``value`` is one integer of Python or NumPy, and not a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_)


def integer(name: str, value: Any, minimum: int | None = None, below: int | None = None) -> None:
    """Refuse a value that is not an integer in [``minimum``, ``below``).

    Raises:
      ParameterError: ``value`` is not such an integer.
    """
    if not is_integer(value):
        raise ParameterError(name, f"must be an integer, got {value!r}")
    if minimum is not None and value < minimum:
        raise ParameterError(name, f"must be at least {minimum}, got {value}")
    if below is not None and value >= below:
        raise ParameterError(name, f"must be below {'2^31' if below == 2**31 else below}, got {value}")


def positive(name: str, value: Any) -> None:
    """Refuse a value that is not a positive finite number; arrays of JAX pass, because they may be traced.

    Raises:
      ParameterError: ``value`` is not such a number.
    """
    if not (_is_traceable(value) or (is_real(value) and np.isfinite(value) and value > 0)):
        raise ParameterError(name, f"must be a positive finite number, got {value!r}")


def between(name: str, value: Any, low: float, high: float) -> None:
    """Refuse a value that is not a number in [low, high]; arrays of JAX pass, because they may be traced.

    Raises:
      ParameterError: ``value`` is not such a number.
    """
    if not (_is_traceable(value) or (is_real(value) and low <= value <= high)):
        raise ParameterError(name, f"must be between {low:g} and {high:g}, got {value!r}")


def fraction(name: str, value: Any, below: float = 1.0) -> None:
    """Refuse a value that is not a number in [0, ``below``); arrays of JAX pass, because they may be traced.

    Raises:
      ParameterError: ``value`` is not such a number.
    """
    if not (_is_traceable(value) or (is_real(value) and 0 <= value < below)):
        raise ParameterError(name, f"must be at least 0 and below {below:g}, got {value!r}")


def finite(name: str, value: Any, low: float = 0.0) -> None:
    """Refuse a value that is not a finite number of at least ``low``; arrays of JAX pass, because they may be traced.

    Raises:
      ParameterError: ``value`` is not such a number.
    """
    if not (_is_traceable(value) or (is_real(value) and np.isfinite(value) and value >= low)):
        raise ParameterError(name, f"must be a finite number{f' ≥ {low:g}' if low > -np.inf else ''}, got {value!r}")


def rate(name: str, value: Any) -> None:
    """Refuse a learning rate that is neither a schedule nor a finite number of at least 0; JAX arrays pass.

    Raises:
      ParameterError: ``value`` is neither.
    """
    if not (callable(value) or _is_traceable(value) or (is_real(value) and np.isfinite(value) and value >= 0)):
        raise ParameterError(name, f"must be a finite number ≥ 0 or a schedule over rounds, got {value!r}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]
