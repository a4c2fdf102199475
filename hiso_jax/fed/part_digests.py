"""Digests of functions and the values that they close over, to detect that a method differs from a run's method.

An optax optimizer, a schedule or a combiner is a function that closes over its option values. Two functions that were
made with the same options have the same name and close over the same values.
"""

import dataclasses
import hashlib
import types
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np


def digest(value: Any) -> str:
    """The digest of the names and values in ``value``; it is the same in every process with the same packages.

    Args:
      value: functions, dataclasses, containers, arrays and numbers, nested in any order. Of a function, the closure
        and the defaults are read, but no global variables; of any other object, only the type.
    """
    return hashlib.sha256("\n".join(_words(value, set())).encode()).hexdigest()[:16]


def _words(value: Any, seen: set[int]) -> list[str]:
    if isinstance(value, jax.core.Tracer):
        return ["traced"]
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | type):
        return [repr(value)]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _of_array(value)
    if id(value) in seen:
        return ["again"]
    seen = seen | {id(value)}
    return [type(value).__qualname__, *(word for part in _parts(value) for word in ("(", *_words(part, seen), ")"))]


def _of_array(array: Any) -> list[str]:
    said = [str(array.dtype), str(array.shape)]
    if not getattr(array, "is_fully_addressable", True):
        return said
    plain = jax.random.key_data(array) if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key) else array
    return [*said, hashlib.sha256(np.ascontiguousarray(plain).tobytes()).hexdigest()]


def _parts(value: Any) -> list[Any]:
    """The parts of a value that is not a number."""
    if isinstance(value, Mapping):
        return [part for name in sorted(value, key=repr) for part in (name, value[name])]
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, types.FunctionType):
        return [value.__qualname__, *_constants(value.__code__), *_held(value)]
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    # Wrappers by jax.jit and functools.
    if hasattr(value, "__wrapped__"):
        return [value.__wrapped__]
    return [vars(value)] if callable(value) and hasattr(value, "__dict__") else []


def _constants(code: types.CodeType) -> list[Any]:
    """The numeric literals in a function's body, including nested functions."""
    found: list[Any] = []
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found += _constants(constant)
        elif isinstance(constant, bool | int | float | complex):
            found.append(constant)
    return found


def _held(function: types.FunctionType) -> list[Any]:
    """The values that a function closes over, and its defaults."""
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # the variable is not bound yet
            cells.append(None)
    return [cells, function.__defaults__, function.__kwdefaults__]
