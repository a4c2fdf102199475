"""Clients that train by themselves and send trees like the parameters (McMahan et al., arXiv 1602.05629)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from hiso_jax.fed.codes import are_finite
from hiso_jax.fed.devices import Part, filled, in_pieces
from hiso_jax.fed.keys import client_key
from hiso_jax.fed.measure.context import Cohort, Estimator, Measured, RoundContext


class LocalClient(NamedTuple):
    """One client, as :class:`Local` sees it.

    Attributes:
      loss: ``(params, batch) → scalar``.
      params: x_r, the server's parameters.
      batches: [K, B, ...] examples, one batch a local step.
      key: the client's own in this round.
      round_number: r, for schedules.
      num_perturbations: P of the run.
      mu: μ of the run.
    """

    loss: Callable[[PyTree, Any], Float[Array, ""]]
    params: PyTree
    batches: PyTree
    key: Key[Array, ""]
    round_number: Int[Array, ""]
    num_perturbations: int
    mu: Any


@dataclass(frozen=True)
class Local:
    """A client trains by itself and sends a tree like the parameters: first-order methods, or whole vectors.

    Such messages are not kept, so there is no replay from them.

    Attributes:
      train: client → (message, its loss where the round began).
      cost: (K, P) → the evaluations of its loss that a client's round costs; a gradient is counted as three (forward,
        and a backward pass of about two).
      reads: which of the options "perturbations" and "mu" it reads.
    """

    train: Callable[[LocalClient], tuple[PyTree, Float[Array, ""]]]
    cost: Callable[[int, int], int]
    reads: tuple[str, ...] = ()
    has_scalars: ClassVar[bool] = False

    @property
    def description(self) -> str:
        """The name of ``train``."""
        return getattr(self.train, "__qualname__", type(self.train).__qualname__)

    def passes(self, local_steps: int, num_perturbations: int) -> int:
        """Evaluations of its loss that a client makes in a round."""
        return self.cost(local_steps, num_perturbations)

    def message_shapes(self, estimator: Estimator, params: PyTree, clients: int, dtype: Any) -> PyTree:
        """Those of the parameters, [C, ...]."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((clients, *x.shape), dtype), params)

    def measure(self, context: RoundContext, cohort: Cohort, part: Part) -> Measured:
        """Every client's message; or their mean, where only that is needed: messages then exist by pieces."""
        if context.sums_only:
            return _averaged(self, context, cohort, part)
        return Measured(*part.join(_train(self, context, cohort)))

    def ascent(self, context: RoundContext, measured: Measured, aggregate: PyTree) -> None:
        """None: there are no directions."""


def _train(
    local: Local, context: RoundContext, cohort: Cohort
) -> tuple[PyTree[Shaped[Array, "c ..."]], Float[Array, "c"]]:
    """The messages of some clients, and their losses where the round began."""

    def loss(params: PyTree, batch: Any) -> Float[Array, ""]:
        return context.mean_losses(params, batch)[0]

    def one(client: tuple[Array, PyTree]) -> tuple[PyTree, Float[Array, ""]]:
        number, batches = client
        return local.train(
            LocalClient(
                loss=loss,
                params=context.params,
                batches=context.fetch(batches),
                key=client_key(context.keys.channel, number),
                round_number=context.keys.number,
                num_perturbations=context.estimator.num_perturbations,
                mu=context.estimator.mu,
            )
        )

    clients = cohort.client_ids, context.batches(cohort.batches)
    # Not a vmap of one where one client is asked for: even that makes convolutions grouped.
    if context.execution.vmapped == 1:
        return lax.map(one, clients)
    return in_pieces(jax.vmap(one), clients, context.execution.vmapped)


def _averaged(local: Local, context: RoundContext, cohort: Cohort, part: Part) -> Measured:
    """The weighted mean of a cohort's messages, which exist for one piece of the cohort at a time.

    Only sums cross the devices. Equal to the mean of all messages up to rounding, and zero if no client is valid.
    """
    count, clients = len(cohort.client_ids), len(context.cohort.client_ids)
    pieces = -(-count // context.execution.stream)
    length = -(-count // pieces)
    # Copies that fill up, of the mesh or of the last piece, weigh nothing.
    weights = jnp.where(part.places < clients, cohort.weights, 0)
    whole: Cohort = filled(cohort._replace(weights=weights), pieces * length)
    whole = whole._replace(weights=jnp.where(jnp.arange(pieces * length) < count, whole.weights, 0))
    stacked = jax.tree.map(lambda a: a.reshape(pieces, length, *a.shape[1:]), whole)
    shapes = jax.eval_shape(lambda own: _train(local, context, own)[0], whole)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], jnp.promote_types(x.dtype, jnp.float32)), shapes)

    def absorb(sums: tuple[PyTree, Array], own: Cohort) -> tuple[tuple[PyTree, Array], tuple[Array, Array]]:
        messages, losses = _train(local, context, own)
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
    return Measured(None, losses, mean=mean, valid=valid)
