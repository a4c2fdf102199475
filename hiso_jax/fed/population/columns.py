"""Columns of the data (labels or owners) as arrays that can be sorted and compared."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from hiso_jax.checks import ParameterError, first_line, shown

KINDS = {"integers": "iu", "numbers": "f", "text": "US", "truth values": "b"}


def column_of(name: str, values: Sequence[Any] | np.ndarray, *kinds: str) -> Shaped[np.ndarray, "n"]:
    """One value for each example; all values are of one of the ``kinds``.

    Args:
      name: the parameter's name, for error messages.
      values: the column, an array or a list.
      kinds: the accepted kinds of values: "integers", "numbers", "text", "truth values".

    Raises:
      ValueError: the column has another shape or kind, mixes kinds, or has a number that is not finite.
    """
    try:
        column = np.asarray(values)
    except Exception as error:
        raise ParameterError(name, f"must be one value for each example ({first_line(error)})") from error
    if not column.ndim:
        raise ParameterError(name, f"must be one value for each example, got {shown(values)}")
    if column.dtype.kind == "O":
        values = column.tolist()
        column = np.asarray(values)
    # NumPy would silently turn a list of text and numbers into text.
    types = set() if hasattr(values, "dtype") else set(map(type, values))
    mixed = len({(issubclass(t, str | bytes), issubclass(t, bool | np.bool_)) for t in types}) > 1
    if mixed or column.ndim != 1 or not len(column) or column.dtype.kind not in "".join(map(KINDS.__getitem__, kinds)):
        got = " and ".join(sorted(t.__name__ for t in types)) if mixed else f"{column.dtype} of shape {column.shape}"
        raise ParameterError(name, f"must be one value for each example, all {' or all '.join(kinds)}; got {got}")
    if column.dtype.kind == "f" and not np.isfinite(column).all():
        raise ParameterError(
            name, f"must be finite numbers; that of example {int(np.argmin(np.isfinite(column)))} is not"
        )
    return column
