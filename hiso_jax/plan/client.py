"""The memory of one client, from programs that are compiled from shapes alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hiso_jax import fed
from hiso_jax.fed.task import bind, frozen_of
from hiso_jax.zo import in_float32, working_dtype

# More steps need no more memory than two.
STEPS = 2


class ClientMemory(NamedTuple):
    """Bytes that a client needs for one batch at a time, with its parameters and its batches.

    Attributes:
      inference: to run the model forward.
      training: to take several local steps: its own parameters and the sum of its gradients, in float32 or wider, and
        the activations.
    """

    inference: int
    training: int


def client_memory(task: fed.Task, batch_size: int) -> ClientMemory:
    """The memory of a client that evaluates the loss of one batch, and of a client that takes local steps.

    Both programs are compiled for the default device, for arguments that are not there. The bytes depend on the
    compiler.

    Args:
      task: the task.
      batch_size: examples in a batch.
    """
    params = jax.eval_shape(task.init, jax.random.key(0))
    frozen: Any = frozen_of(task)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), frozen)

    def batches(*lead: int) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((*lead, batch_size, *a.shape[1:]), a.dtype), task.train)

    def loss(params: Any, batch: Any, frozen: Any) -> jax.Array:
        return in_float32(bind(task.loss, frozen))(params, batch).mean()

    def train(params: Any, batches: Any, frozen: Any) -> Any:
        # The local steps of ``fed.Projections``.
        start = jax.tree.map(lambda x: x.astype(working_dtype(x)), params)

        def step(carry: tuple[Any, Any], batch: Any) -> tuple[tuple[Any, Any], None]:
            gradient = jax.grad(loss)(carry[0], batch, frozen)
            moved = jax.tree.map(lambda x, g: x - 0.1 * g, carry[0], gradient)
            return (moved, jax.tree.map(jnp.add, carry[1], gradient)), None

        return jax.lax.scan(step, (start, jax.tree.map(jnp.zeros_like, start)), batches)[0][1]

    def needed(function: Any, data: Any) -> int:
        found: Any = jax.jit(function).lower(params, data, shapes).compile().memory_analysis()
        return found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes

    return ClientMemory(needed(loss, batches()), needed(train, batches(STEPS)))
