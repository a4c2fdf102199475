"""What the commands return to the shell, and the error behind bad usage."""

from collections.abc import Iterator
from contextlib import contextmanager

DONE = 0
FAILED = 1
USAGE = 2
DIVERGED = 3


class UsageError(Exception):
    """The command cannot be carried out as given; its message is one sentence for the user."""


def told(error: OSError) -> str:
    """What the file system said, with the file that it is about."""
    why = error.strerror or str(error)
    return f"{error.filename}: {why}" if error.filename else why


class Stopped(Exception):
    """The command had to stop half-way, and can be continued; its message is one sentence for the user."""


@contextmanager
def naming(**options: str) -> Iterator[None]:
    """A ValueError that begins with a parameter of the library begins with the command's option instead.

    Args:
      options: by the names of the parameters.
    """
    try:
        yield
    except ValueError as error:
        first, _, rest = str(error).partition(" ")
        raise ValueError(f"{options.get(first, first)} {rest}") from error


@contextmanager
def refusing() -> Iterator[None]:
    """While a command is being set up: a ValueError speaks of what the user asked for."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error
