"""The small files of a checkpoint's folder, which may come from anywhere."""

import json
import stat
from pathlib import Path
from typing import Any

from hiso_jax.checks import ParameterError

# Bytes of a configuration or an index; a reader of JSON takes many times as much.
MOST_JSON = 2**25


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small file of JSON.

    Raises:
      ValueError: there is none.
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
    """Refuse a folder with what a reader would wait at: pipes, sockets and devices.

    Raises:
      ValueError: there is one.
    """
    for path in sorted(folder.iterdir()):
        kind = path.stat().st_mode if path.exists() else stat.S_IFREG
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            raise ParameterError("model", f"must be a folder of files; {path} is none")
