"""Several processes at one comparison: each method is tuned and run by one of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCKS = ".locks"


@contextmanager
def own_method(directory: Path, place: int) -> Iterator[bool]:
    """Whether the method at this place of a comparison is this process's; the lock ends with its process."""
    held = _lock(directory, f"method-{place}")
    try:
        held.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        held.release()


def writing(directory: Path) -> FileLock:
    """Enter it to read what all processes have tried and to write it with what is new."""
    return _lock(directory, "tuning")


def _lock(directory: Path, name: str) -> FileLock:
    (directory / LOCKS).mkdir(exist_ok=True)
    return FileLock(directory / LOCKS / name)
