"""Paths that users give."""

import os
from pathlib import Path
from typing import Any

from hiso_jax.checks import ParameterError, shown


def as_path(name: str, value: Any) -> Path:
    """The path that a user gives.

    Args:
      name: the parameter.
      value: text or a path.

    Raises:
      ParameterError: it is neither, or it is empty.
    """
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise ParameterError(name, f"must be a path, got {shown(value)}")
    return Path(value)
