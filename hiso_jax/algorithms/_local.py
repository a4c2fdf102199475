"""Local training of clients, shared by several methods: K steps of plain SGD, whose difference is the message."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, PyTree

from hiso_jax.checks import rate
from hiso_jax.fed.algorithm import LocalClient

Estimate = Callable[[LocalClient, PyTree, Any, Array], tuple[Float[Array, ""], PyTree]]
"""(client, parameters, batch, local step) → (loss, gradient or an estimate of it)."""


def backpropagated(client: LocalClient, params: PyTree, batch: Any, step: Array) -> tuple[Float[Array, ""], PyTree]:
    """The loss and its exact gradient."""
    return jax.value_and_grad(client.loss)(params, batch)


def local_sgd(
    learning_rate: optax.ScalarOrSchedule, estimate: Estimate = backpropagated, *, proximal: float = 0.0
) -> Callable[[LocalClient], tuple[PyTree, Float[Array, ""]]]:
    """x_{k+1} = x_k − η (g(x_k) + proximal · (x_k − x_0)) for k < K; the message is x_0 − x_K.

    Args:
      learning_rate: η, a number or a schedule over rounds.
      estimate: the gradient, or an estimate of it.
      proximal: the weight of the pull towards the server's parameters.
    """
    rate("learning_rate", learning_rate)

    def train(client: LocalClient) -> tuple[PyTree, Float[Array, ""]]:
        eta = learning_rate(client.round_number) if callable(learning_rate) else learning_rate
        # In float32, because small steps would be lost in bfloat16.
        start = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), client.params)

        def step(local: PyTree, inputs: tuple[Array, PyTree]) -> tuple[PyTree, Float[Array, ""]]:
            number, batch = inputs
            loss, gradient = estimate(client, local, batch, number)

            def move(x: Array, g: Array, origin: Array) -> Array:
                pulled = g if proximal == 0 else g + proximal * (x - origin)
                return x - eta * pulled.astype(x.dtype)

            return jax.tree.map(move, local, gradient, start), loss

        steps = jax.tree.leaves(client.batches)[0].shape[0]
        local, losses = lax.scan(step, start, (jnp.arange(steps), client.batches))
        return jax.tree.map(jnp.subtract, start, local), losses[0]

    return train


def gradients(local_steps: int, num_perturbations: int) -> int:
    """The cost of K gradients in forward passes; each gradient counts as three."""
    return 3 * local_steps
