"""Files that a reader finds complete or not at all, even after a kill or a power failure."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hiso_jax.checks import ParameterError


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` to a temporary file beside ``path``, wait until it is on disk, and rename it to ``path``.

    Raises:
      OSError: it cannot be written; a file at ``path`` is unchanged, and no temporary file remains.
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
    """Make an OSError raised inside name ``path``: errors of reads and writes of open files name no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None or str(error.filename) != str(path):
            raise type(error)(error.errno, error.strerror or str(error), str(path)) from error
        raise


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder; False for a name that no file can have."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def exists(path: Path, parameter: str = "out") -> bool:
    """Whether a file, a folder or a link exists at ``path``, even a link without a target.

    Raises:
      ValueError: no file can have such a name, for example because it is too long; the message begins with
        ``parameter``.
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
    """The bytes of a regular file. A device is refused, and a pipe, which would wait for a writer.

    Raises:
      ValueError: ``path`` is not a regular file, or cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path} cannot be read: it is not a regular file")
        return path.read_bytes()
    except FileNotFoundError as error:
        others = sorted(path.parent.glob(f"runs/*/{path.name}"))
        hint = f"; {path.parent} holds several runs, the first is {others[0].parent}" if others else ""
        raise ValueError(f"{path} cannot be read: {error.strerror}{hint}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def links_in(folder: Path) -> list[Path]:
    """The symbolic links in a folder and its subfolders: a write to such a name is a write elsewhere."""
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
