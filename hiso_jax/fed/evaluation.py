"""Metrics of a model over a whole data split, and the rounds at which a target is reached."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from hiso_jax.fed.execution import filled
from hiso_jax.fed.mesh import CLIENTS

EVALUATION_CHUNK = 512


def make_evaluate(
    metrics: Callable[[PyTree, PyTree], Mapping[str, Array]],
    chunk: int = EVALUATION_CHUNK,
    mesh: Mesh | None = None,
) -> Callable[[PyTree, PyTree], dict[str, Float[Array, ""]]]:
    """A jit-able ``(params, data) → {name: mean over the examples}``, ``chunk`` examples at a time.

    The last chunk is padded and the padding dropped, so every example counts once.

    Args:
      metrics: ``(params, batch) → {name: [B]}``.
      chunk: how many examples to evaluate at once.
      mesh: splits each chunk over its axis ``clients``.
    """

    def evaluate(params: PyTree, data: PyTree) -> dict[str, Float[Array, ""]]:
        examples = jax.tree.leaves(data)[0].shape[0]
        size = min(chunk, examples)
        chunks = -(-examples // size)

        whole = filled(data, chunks * size)
        stacked = jax.tree.map(lambda a: a.reshape(chunks, size, *a.shape[1:]), whole)

        def evaluate_chunk(batch: PyTree) -> dict[str, Array]:
            if mesh is not None and size % mesh.shape[CLIENTS] == 0:
                batch = lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec(CLIENTS)))
            return dict(metrics(params, batch))

        values = lax.map(evaluate_chunk, stacked)
        return {name: value.reshape(-1)[:examples].astype(jnp.float32).mean() for name, value in values.items()}

    return evaluate


def first_at_target(values: Sequence[float], target: float) -> int | None:
    """The index of the first evaluation whose mean with the next two is at least ``target``, or None."""
    for i in range(len(values) - 2):
        if sum(values[i : i + 3]) / 3 >= target:
            return i
    return None
