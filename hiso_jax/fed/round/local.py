"""Clients that train by themselves and send trees like the parameters (McMahan et al., arXiv 1602.05629)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from hiso_jax.fed.algorithm import Local, LocalClient, are_finite
from hiso_jax.fed.devices import Execution, Part, filled, in_pieces
from hiso_jax.fed.keys import client_key
from hiso_jax.fed.round.inputs import Cohort, Data, Estimator, Keys


class Trainer(NamedTuple):
    """All that a cohort needs to train in a round.

    Attributes:
      local: what a client does.
      estimator: K, P and μ.
      execution: how many clients to take through memory at a time.
      data: where batches come from.
      params: x_r.
      keys: of the round.
    """

    local: Local
    estimator: Estimator
    execution: Execution
    data: Data
    params: PyTree
    keys: Keys


def train(trainer: Trainer, cohort: Cohort) -> tuple[PyTree[Shaped[Array, "c ..."]], Float[Array, "c"]]:
    """The messages of some clients, and their losses where the round began."""

    def loss(params: PyTree, batch: Any) -> Float[Array, ""]:
        return trainer.data.mean_losses(params, batch)[0]

    def one(client: tuple[Array, PyTree]) -> tuple[PyTree, Float[Array, ""]]:
        number, batches = client
        return trainer.local.train(
            LocalClient(
                loss=loss,
                params=trainer.params,
                batches=trainer.data.fetch(batches),
                key=client_key(trainer.keys.channel, number),
                round_number=trainer.keys.number,
                num_perturbations=trainer.estimator.num_perturbations,
                mu=trainer.estimator.mu,
            )
        )

    clients = cohort.numbers, trainer.data.batches(cohort.batches)
    # Not a vmap of one where one client is asked for: even that makes convolutions grouped.
    if trainer.execution.vmapped == 1:
        return lax.map(one, clients)
    return in_pieces(jax.vmap(one), clients, trainer.execution.vmapped)


class Averaged(NamedTuple):
    """A cohort's weighted mean.

    Attributes:
      mean: of the valid clients' messages; zero if there is none.
      valid: which clients reported finite numbers only, [C].
      losses: every client's where the round began, [C].
    """

    mean: PyTree
    valid: Bool[Array, "C"]
    losses: Float[Array, "C"]


def train_and_average(trainer: Trainer, cohort: Cohort, part: Part, clients: int) -> Averaged:
    """The weighted mean of a cohort's messages, which exist for one piece of the cohort at a time.

    Only sums cross the devices. Equal to the mean of all messages up to rounding.

    Args:
      trainer: what the cohort needs.
      cohort: this device's part of it.
      part: its place among others'.
      clients: C, of all devices together.
    """
    count = len(cohort.numbers)
    pieces = -(-count // trainer.execution.stream)
    length = -(-count // pieces)
    # Copies that fill up, of the mesh or of the last piece, weigh nothing.
    weights = jnp.where(part.places < clients, cohort.weights, 0)
    whole: Cohort = filled(cohort._replace(weights=weights), pieces * length)
    whole = whole._replace(weights=jnp.where(jnp.arange(pieces * length) < count, whole.weights, 0))
    stacked = jax.tree.map(lambda a: a.reshape(pieces, length, *a.shape[1:]), whole)
    shapes = jax.eval_shape(lambda own: train(trainer, own)[0], whole)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], jnp.promote_types(x.dtype, jnp.float32)), shapes)

    def absorb(sums: tuple[PyTree, Array], own: Cohort) -> tuple[tuple[PyTree, Array], tuple[Array, Array]]:
        messages, losses = train(trainer, own)
        valid = (own.weights > 0) & are_finite(messages)
        counted = jnp.where(valid, own.weights, 0)

        def add(total: Array, message: Array) -> Array:
            finite = jnp.where(jnp.expand_dims(valid, range(1, message.ndim)), message, 0)
            return total + jnp.tensordot(counted, finite, 1, precision="highest")

        return (jax.tree.map(add, sums[0], messages), sums[1] + counted.sum()), (valid, losses)

    (total, weight), (valid, losses) = lax.scan(absorb, (zero, jnp.zeros((), weights.dtype)), stacked)
    total, weight = part.total((total, weight))
    mean = jax.tree.map(lambda x: x / jnp.where(weight > 0, weight, 1).astype(x.dtype), total)
    valid, losses = part.join((valid.reshape(-1)[:count], losses.reshape(-1)[:count]))
    return Averaged(mean, valid, losses)
