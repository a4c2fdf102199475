"""Exit codes of the commands, and the errors that end a command."""

from collections.abc import Iterator
from contextlib import contextmanager

from hiso_jax.checks import ParameterError

DONE = 0
FAILED = 1
USAGE = 2
DIVERGED = 3


class UsageError(Exception):
    """The command cannot be carried out as given.

    Attributes:
      message: one sentence for the user; without its first word if ``parameter`` is set.
      parameter: name of the parameter that the sentence begins with, or None.
    """

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message if parameter is None else f"{parameter} {message}")
        self.message, self.parameter = message, parameter


def described(error: OSError) -> str:
    """The message of a file-system error, with the name of the file."""
    why = error.strerror or str(error)
    return f"{error.filename}: {why}" if error.filename else why


class Stopped(Exception):
    """The command had to stop half-way; the error's message is one sentence for the user."""


@contextmanager
def refusing() -> Iterator[None]:
    """Raise a ValueError inside the context as a :class:`UsageError`, since it is about the user's options."""
    try:
        yield
    except ParameterError as error:
        raise UsageError(error.message, error.parameter) from error
    except ValueError as error:
        raise UsageError(str(error)) from error
