"""The memory of one client, from programs that are compiled from shapes alone."""

from typing import Any

import jax

from hiso_jax import fed
from hiso_jax.fed.measure import in_working_dtype, progress_of
from hiso_jax.fed.task import bind, frozen_of
from hiso_jax.zo import in_float32

# More steps need no more memory than two.
STEPS = 2


def training_bytes(task: fed.Task, batch_size: int) -> int:
    """The bytes that a client needs to take several local steps on one batch each.

    They hold the server's parameters and the batches, the client's own parameters and the sum of its gradients, in
    float32 or wider, and the activations. The program is compiled for the default device, for arguments that are not
    there, so the bytes depend on the compiler.

    Args:
      task: the task.
      batch_size: examples in a batch.
    """
    params = jax.eval_shape(task.init, jax.random.key(0))
    frozen: Any = frozen_of(task)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), frozen)

    batches = jax.tree.map(lambda a: jax.ShapeDtypeStruct((STEPS, batch_size, *a.shape[1:]), a.dtype), task.train)

    def loss(params: Any, batch: Any, frozen: Any) -> jax.Array:
        return in_float32(bind(task.loss, frozen))(params, batch).mean()

    def train(params: Any, batches: Any, frozen: Any) -> Any:
        def of_batch(params: Any, batch: Any) -> jax.Array:
            return loss(params, batch, frozen)

        return progress_of(of_batch, in_working_dtype(params), batches, 0.1)[0]

    found: Any = jax.jit(train).lower(params, batches, shapes).compile().memory_analysis()
    return found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
