"""Agreement between the processes of one run, on the next action and on failure."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

T = TypeVar("T")


def _worst(number: int) -> int:
    """The largest ``number`` of all processes; each process waits for the others."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.array(number))))


def all_processes(ready: bool) -> bool:
    """Whether every process is ready; each process waits for the others."""
    return not _worst(not ready)


def agree(mesh: Mesh | None, *numbers: int) -> tuple[int, ...]:
    """The ``numbers`` of process 0, in every process of a mesh: clocks and signals differ, but programs must not."""
    if mesh is None or jax.process_count() == 1:
        return numbers
    return tuple(int(x) for x in multihost_utils.broadcast_one_to_all(np.array(numbers, np.int32)))


def in_all_processes(step: Callable[..., T], *arguments: Any) -> T:
    """``step(*arguments)``; a failure in any process raises in all, because the others would wait for it forever.

    Raises:
      Exception: the error that ``step`` raised in this process.
      OSError: ``step`` raised an OSError in another process.
      ValueError: ``step`` raised an error of another kind in another process.
    """
    value, trouble = None, None
    try:
        value = step(*arguments)
    except Exception as error:
        trouble = error
    worst = _worst(0 if trouble is None else 2 if isinstance(trouble, OSError) else 1)
    if worst:
        raise trouble or (ValueError, OSError)[worst - 1]("another process failed; see its error message")
    return cast(T, value)
