"""The metrics of a model over an entire data split, and the first evaluation that reaches a target."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, Shaped

from hiso_jax.checks import ParameterError
from hiso_jax.fed.devices import CLIENTS, evaluation_bytes, filled, memory_budget
from hiso_jax.fed.task import bind

EVALUATION_CHUNK = 512
# Tolerance for the rounding of a sum of three shares. One example in a million changes a share 1,000 times as much.
ROUNDING = 1e-9


def make_evaluate(
    metrics: Callable[..., Mapping[str, Array]],
    *,
    budget: int | None = None,
    mesh: Mesh | None = None,
) -> Callable[..., dict[str, Shaped[Array, "n ..."]]]:
    """A jit-able ``(params, data, frozen=None) → {name: [n, ...]}``, the metrics of every example.

    It computes a chunk at a time. The last chunk is padded and the padding dropped, so that every example counts once.

    Args:
      metrics: ``(params, batch) → {name: [B, ...]}``, with a third argument if there are frozen parameters.
      budget: bytes that a chunk may take; None means :func:`memory_budget`.
      mesh: devices; the axis ``clients`` splits each chunk.

    Raises:
      ValueError: at the call, ``metrics`` does not return numbers by name, one for each example.
    """

    def evaluate(params: PyTree, data: PyTree, frozen: PyTree | None = None) -> dict[str, Shaped[Array, "n ..."]]:
        of_batch = bind(metrics, frozen)
        examples = jax.tree.leaves(data)[0].shape[0]
        fitting = (memory_budget() if budget is None else budget) // evaluation_bytes(of_batch, params, data, 1)
        size = max(1, min(EVALUATION_CHUNK, examples, fitting))
        chunks = -(-examples // size)

        whole = filled(data, chunks * size)
        stacked = jax.tree.map(lambda a: a.reshape(chunks, size, *a.shape[1:]), whole)

        def evaluate_chunk(batch: PyTree) -> dict[str, Array]:
            if mesh is not None and size % mesh.shape[CLIENTS] == 0:
                batch = lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec(CLIENTS)))
            return _checked(of_batch(params, batch), size)

        values = lax.map(evaluate_chunk, stacked)
        values = {name: value.reshape(-1, *value.shape[2:])[:examples] for name, value in values.items()}
        if mesh is None:
            return values
        # Every device gets the entire arrays, because every process reads them.
        return lax.with_sharding_constraint(values, NamedSharding(mesh, PartitionSpec()))

    return evaluate


def _checked(metrics: Any, examples: int) -> dict[str, Array]:
    """The metrics of a batch as a dict, checked to have one entry for each example.

    Raises:
      ValueError: the metrics have another form, for example a mean over the batch. Batch means do not give the mean
        over a split, because its last batch is padded.
    """
    if not isinstance(metrics, Mapping) or not metrics or not all(isinstance(name, str) for name in metrics):
        raise ParameterError(
            "metrics", f'must return numbers by name, {{"loss": …}} say; got a {type(metrics).__name__}'
        )
    for name, value in metrics.items():
        shape = getattr(value, "shape", ())
        if not shape or shape[0] != examples:
            raise ParameterError(
                "metrics",
                f"must give a number for each example, of shape ({examples},) for {examples} examples; "
                f"{name} has {shape}{'' if shape else ': do not take its mean'}",
            )
        if not jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.kind not in "biu":
            raise ParameterError("metrics", f"must give numbers; {name} is of {value.dtype}")
    return dict(metrics)


def first_at_target(values: Sequence[float], target: float) -> int | None:
    """The index of the first evaluation whose mean with the next two is at least ``target``, or None."""
    for i in range(len(values) - 2):
        window = values[i : i + 3]
        # Non-finite values have no exact sum. The tolerance accepts a mean that misses the target only by rounding: in
        # floats (0.7 + 0.7 + 0.7) / 3 is below 0.7, and 0.47 + 0.47 + 0.71 is below 3 · 0.55.
        total = math.fsum(window) if all(map(math.isfinite, window)) else sum(window)
        if total >= 3 * target - ROUNDING * max(1.0, abs(target)):
            return i
    return None


def as_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """A callback's metrics as the numbers that a ledger keeps.

    Raises:
      ParameterError: a metric is not one number.
    """
    found = {}
    for name, value in metrics.items():
        try:
            found[name] = float(np.asarray(value, np.float64).reshape(()))
        except (TypeError, ValueError):
            raise ParameterError("callbacks", f"must return numbers as metrics; {name} is {value!r}") from None
    return found
