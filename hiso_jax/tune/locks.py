"""Locks for several processes in one comparison: one process tunes and runs each method."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCKS = ".locks"


@contextmanager
def own_method(directory: Path, place: int) -> Iterator[bool]:
    """Yield whether this process holds the lock of the method at this place; the lock ends with the process."""
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
    """The lock under which a process reads the trials of all processes and adds its own."""
    return _lock(directory, "tuning")


def _lock(directory: Path, name: str) -> FileLock:
    (directory / LOCKS).mkdir(exist_ok=True)
    return FileLock(directory / LOCKS / name)
