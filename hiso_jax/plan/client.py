"""The memory of one client, from programs that are compiled from shapes alone."""

from typing import Any, NamedTuple

import jax

from hiso_jax import fed
from hiso_jax.fed.task import bind, frozen_of
from hiso_jax.zo import in_float32


class ClientMemory(NamedTuple):
    """Bytes that a client needs for one batch, with its parameters and the batch.

    Attributes:
      inference: to run the model forward.
      training: to compute a gradient, which also keeps the activations and the gradient.
    """

    inference: int
    training: int


def client_memory(task: fed.Task, batch_size: int) -> ClientMemory:
    """The memory of a client that evaluates the loss of one batch, and of one that computes its gradient.

    Both programs are compiled for the default device, for arguments that are not there.

    Args:
      task: the task.
      batch_size: examples in a batch.
    """
    params = jax.eval_shape(task.init, jax.random.key(0))
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch_size, *a.shape[1:]), a.dtype), task.train)
    frozen: Any = frozen_of(task)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), frozen)

    def loss(params: Any, batch: Any, frozen: Any) -> jax.Array:
        return in_float32(bind(task.loss, frozen))(params, batch).mean()

    def needed(function: Any) -> int:
        found: Any = jax.jit(function).lower(params, batch, shapes).compile().memory_analysis()
        return found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes

    return ClientMemory(needed(loss), needed(jax.value_and_grad(loss)))
