"""Files that a reader finds whole or not at all, also after a kill or a power failure."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hiso_jax.checks import ParameterError


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` beside ``path``, wait until it is on disk, and give it its name.

    Raises:
      OSError: it cannot be written; what was at ``path`` is still there, and nothing beside it.
    """
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    with naming(path):
        _write_file(path, temporary, content)


def _write_file(path: Path, temporary: Path, content: bytes) -> None:
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the file system inside names ``path``, as those of reads and writes of open files do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None or str(error.filename) != str(path):
            raise type(error)(error.errno, error.strerror or str(error), str(path)) from error
        raise


def is_folder(path: Path) -> bool:
    """Whether there is a folder of that name; a name that none can have is not one."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def exists(path: Path, parameter: str = "out") -> bool:
    """Whether there is something of that name, be it a link to nothing.

    Raises:
      ValueError: nothing can have such a name: it is too long, say; it begins with the name of ``parameter``.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ParameterError(parameter, f"must be a name that a file can have; {str(path)[:60]}…: {why}") from error
    return True


def read_regular(path: Path) -> bytes:
    """The bytes of a file that is one: not of a pipe, which would wait for a writer, or of a device.

    Raises:
      ValueError: it is none, or cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path} cannot be read: it is no file")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def links_in(folder: Path) -> list[Path]:
    """The symbolic links in a folder and in those below it: what is written by their names is written elsewhere."""
    return [
        Path(where) / name
        for where, folders, files in os.walk(folder)
        for name in (*folders, *files)
        if os.path.islink(os.path.join(where, name))
    ]


def sync_directory(folder: Path) -> None:
    """Wait until the names in ``folder`` are on disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
