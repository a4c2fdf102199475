"""Metrics of a model over a whole data split, and the rounds at which a target is reached."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, Shaped

from hiso_jax.checks import ParameterError
from hiso_jax.fed.devices import CLIENTS, evaluation_bytes, filled, memory_budget
from hiso_jax.fed.task import bind

EVALUATION_CHUNK = 512
# Of a sum of three shares; a share of a million examples moves by a thousand times as much.
ROUNDING = 1e-9


def make_evaluate(
    metrics: Callable[..., Mapping[str, Array]],
    *,
    budget: int | None = None,
    mesh: Mesh | None = None,
) -> Callable[..., dict[str, Shaped[Array, "n ..."]]]:
    """A jit-able ``(params, data, frozen=None) → {name: [n, ...]}``, the metrics of every example.

    They are taken a chunk at a time; the last is padded and the padding dropped, so that every example counts once.

    Args:
      metrics: ``(params, batch) → {name: [B, ...]}``, with a third argument if there are frozen parameters.
      budget: bytes that a chunk may take; None means :func:`memory_budget`.
      mesh: splits each chunk over its axis ``clients``.

    Raises:
      ValueError: at the call, metrics that are no numbers by name, one for each example.
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
        # Whole on every device: processes read them.
        return lax.with_sharding_constraint(values, NamedSharding(mesh, PartitionSpec()))

    return evaluate


def _checked(metrics: Any, examples: int) -> dict[str, Array]:
    """Metrics of a batch as a dict, if they have one entry for each of its examples.

    Raises:
      ValueError: they have not: a mean over a batch is none over a split, whose last batch is filled up.
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
        # What is not finite has no exact sum. (0.7 + 0.7 + 0.7) / 3 is below 0.7 in floats, and 0.47 + 0.47 + 0.71
        # below 3 · 0.55: a mean that is at the target but for rounding is there.
        total = math.fsum(window) if all(map(math.isfinite, window)) else sum(window)
        if total >= 3 * target - ROUNDING * max(1.0, abs(target)):
            return i
    return None
