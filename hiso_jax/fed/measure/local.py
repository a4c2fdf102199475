"""Clients that train locally and send trees like the parameters (McMahan et al., arXiv 1602.05629)."""

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
    """The inputs of one client for :class:`Local`.

    Attributes:
      loss: ``(params, batch) → scalar``.
      params: x_r, the server's parameters.
      batches: [K, B, ...] examples, one batch for each local step.
      key: the client's own key in this round.
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
    """A measure that trains on the client and sends a tree like the parameters, as first-order methods do.

    Such messages are not kept in the ledger, so they allow no replay.

    Attributes:
      train: client → (message, its loss at the start of the round).
      cost: (K, P) → the forward passes that a round costs a client; a gradient counts as three, one forward pass and a
        backward pass of about two.
      reads: the options that it reads, among "perturbations" and "mu".
    """

    train: Callable[[LocalClient], tuple[PyTree, Float[Array, ""]]]
    cost: Callable[[int, int], int]
    reads: tuple[str, ...] = ()
    has_scalars: ClassVar[bool] = False
    backpropagates: ClassVar[bool] = True

    @property
    def description(self) -> str:
        """The name of ``train``."""
        return getattr(self.train, "__qualname__", type(self.train).__qualname__)

    def passes(self, local_steps: int, num_perturbations: int) -> int:
        """The number of forward passes that a round costs a client."""
        return self.cost(local_steps, num_perturbations)

    def check(self, estimator: Estimator, directions: str | None) -> None:
        """Nothing is refused."""

    def directions(self, local_steps: int, num_perturbations: int) -> int:
        """None."""
        return 0

    def message_shapes(self, estimator: Estimator, params: PyTree, clients: int, dtype: Any) -> PyTree:
        """The shapes of the parameters with a leading client axis, [C, ...]."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((clients, *x.shape), dtype), params)

    def measure(self, context: RoundContext, cohort: Cohort, part: Part) -> Measured:
        """Train every client. If only the mean is needed, messages are in memory for one piece of the cohort."""
        if context.sums_only:
            return _averaged(self, context, cohort, part)
        return Measured(*part.join(_train(self, context, cohort)))

    def ascent(self, context: RoundContext, measured: Measured, aggregate: PyTree) -> None:
        """None: there are no directions."""


def _train(
    local: Local, context: RoundContext, cohort: Cohort
) -> tuple[PyTree[Shaped[Array, "c ..."]], Float[Array, "c"]]:
    """The messages of some clients, and their losses at the start of the round."""

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
    # One client at a time does not use vmap: even a vmap over one turns convolutions into grouped ones.
    if context.execution.vmapped == 1:
        return lax.map(one, clients)
    return in_pieces(jax.vmap(one), clients, context.execution.vmapped)


def _averaged(local: Local, context: RoundContext, cohort: Cohort, part: Part) -> Measured:
    """The weighted mean of a cohort's messages, which are in memory for one piece of the cohort at a time.

    Devices exchange only sums. The result is equal to the mean of all messages up to rounding, and zero if no client is
    valid.
    """
    count, clients = len(cohort.client_ids), len(context.cohort.client_ids)
    # A client that is trained alone is added at once, while its message is in the cache.
    pieces = count if context.execution.vmapped == 1 else -(-count // context.execution.stream)
    length = -(-count // pieces)
    # Copies that pad the mesh or the last piece have weight 0.
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
