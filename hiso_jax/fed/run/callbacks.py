"""The callbacks of a run as users give them: a list, one alone, or functions."""

from collections.abc import Callable, Sequence
from typing import Any

from hiso_jax.checks import ParameterError
from hiso_jax.checks import function as check_function
from hiso_jax.fed.ledger import Evaluation
from hiso_jax.fed.run.session import Callback, Session

Callbacks = Sequence[Callback | Callable[[Session, Evaluation], Any]] | Callback | Callable[..., Any]
"""Callbacks of a run: a list, or one alone. A function is called with the session and each evaluation."""


def as_callbacks(given: Callbacks) -> tuple[Callback, ...]:
    """The callbacks of a run as objects.

    Raises:
      ParameterError: an object is neither a :class:`Callback` nor a function.
    """
    listed = given if isinstance(given, list | tuple) else [given]
    return tuple(each if isinstance(each, Callback) else _of_function(each) for each in listed)


def _of_function(function: Any) -> Callback:
    if isinstance(function, type) or not callable(function):
        hint = f"{function.__name__}() with parentheses" if isinstance(function, type) else "a function"
        raise ParameterError(
            "callbacks",
            f"must be of fed.Callback, or functions of a session and an evaluation; got {function!r}: {hint}?",
        )
    check_function("callbacks", function, "session, evaluation")
    return Callback(lambda session, evaluation: None if evaluation is None else function(session, evaluation))
