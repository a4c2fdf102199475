"""Readers of the small files in a checkpoint's folder, which is not trusted."""

import json
import stat
from pathlib import Path
from typing import Any

from hiso_jax.checks import ParameterError

# The most bytes of a configuration or an index; a JSON reader takes many times as much memory.
MOST_JSON = 2**25


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file.

    Raises:
      ValueError: the file cannot be read, is too large, or does not hold an object.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_JSON:
            raise ValueError(f"it is no file of at most {MOST_JSON:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ParameterError("model", f"must be a folder with a readable {path.name}; {path}: {reason}") from error
    if not isinstance(content, dict):
        raise ParameterError("model", f"must be a folder with a readable {path.name}; {path} holds no object")
    return content


def check_files(folder: Path) -> None:
    """Refuse a folder with pipes, sockets or devices, on which a reader would block.

    Raises:
      ValueError: the folder has such a file.
    """
    for path in sorted(folder.iterdir()):
        kind = path.stat().st_mode if path.exists() else stat.S_IFREG
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            raise ParameterError("model", f"must be a folder of files; {path} is none")
