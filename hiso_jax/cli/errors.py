"""What the commands return to the shell, and the error behind bad usage."""

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
      message: one sentence for the user, or what follows the name of a parameter.
      parameter: name of a parameter that the sentence begins with, or None.
    """

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message if parameter is None else f"{parameter} {message}")
        self.message, self.parameter = message, parameter


def described(error: OSError) -> str:
    """What the file system said, with the file that it is about."""
    why = error.strerror or str(error)
    return f"{error.filename}: {why}" if error.filename else why


class Stopped(Exception):
    """The command had to stop half-way, and can be continued; its message is one sentence for the user."""


@contextmanager
def refusing() -> Iterator[None]:
    """While a command is being set up: a ValueError speaks of what the user asked for."""
    try:
        yield
    except ParameterError as error:
        raise UsageError(error.message, error.parameter) from error
    except ValueError as error:
        raise UsageError(str(error)) from error
