"""What a value of functions and numbers is made of, written down: so that another method is told from a run's.

An optimizer of optax, a schedule or a combiner is a function that closes over its numbers. Two that were made alike
have the same name and close over the same.
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
    """A digest of the names and the numbers in ``value``, the same in every process with the same packages.

    Args:
      value: functions with what they close over and their defaults, dataclasses, containers, arrays and numbers, in
        any order within one another. Of any other object only its type is read, of a function no global variable.
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
    """What a value that is no number is made of."""
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
    # Of jax.jit and of functools' wrappers.
    if hasattr(value, "__wrapped__"):
        return [value.__wrapped__]
    return [vars(value)] if callable(value) and hasattr(value, "__dict__") else []


def _constants(code: types.CodeType) -> list[Any]:
    """The numbers that a function's body spells out, those of functions in it too."""
    found: list[Any] = []
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found += _constants(constant)
        elif isinstance(constant, bool | int | float | complex):
            found.append(constant)
    return found


def _held(function: types.FunctionType) -> list[Any]:
    """What a function closes over, and its defaults."""
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # of a variable that is not bound yet
            cells.append(None)
    return [cells, function.__defaults__, function.__kwdefaults__]
