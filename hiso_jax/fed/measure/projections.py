"""Clients that can backpropagate and still send scalars: projections of their own progress on the round's directions.

A client takes K steps of a local optimizer from x_r. Its progress is m_i = (x_r − x_{i,K}) / (η_l K); K = 1 is its
gradient. It sends s_{i,p} = ⟨m_i, z_{i,p}⟩ for p < P: one vector of P scalars a round, whatever K is. For K = 1 finite
differences tend to the same scalars as μ → 0. Prior art: FedScalar (arXiv 2410.02260), Ferret (2409.06277), FedMPDD
(2512.20814).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.fed.devices import Part, in_pieces
from hiso_jax.fed.measure.context import Cohort, Estimator, Measured, RoundContext
from hiso_jax.fed.measure.evaluations import directions_of
from hiso_jax.zo import Ascent, working_dtype, zo_state

# A gradient is counted as three evaluations of the loss: forward, and a backward pass of about two.
GRADIENT = 3


@dataclass(frozen=True)
class Projections:
    """A client trains by itself and sends its progress, projected on the round's directions.

    Its message is an array of scalars [1, P]. The sum of the local updates is divided by η_l K: a difference of
    parameters would lose it to cancellation.

    Attributes:
      optimizer: η_l → the optax transformation of the local steps, which starts afresh each round; None is plain SGD.
        η_l is the run's ``local_learning_rate``, independent of the server's rate.
    """

    optimizer: Callable[[Any], optax.GradientTransformation] | None = None
    has_scalars: ClassVar[bool] = True
    backpropagates: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("perturbations", "local_learning_rate")

    @property
    def description(self) -> str:
        """Its name, and whether the local optimizer is another than SGD."""
        return "projections" if self.optimizer is None else "projections of another optimizer's progress"

    def check(self, estimator: Estimator, directions: str | None) -> None:
        """Refuse what does not suit.

        Raises:
          ParameterError: several local steps or another optimizer than SGD without a local rate, or directions kept.
        """
        if estimator.local_learning_rate is None:
            if estimator.local_steps > 1:
                raise ParameterError(
                    "local_learning_rate", f"must be given for projections of {estimator.local_steps} local steps"
                )
            if self.optimizer is not None:
                raise ParameterError("local_learning_rate", "must be given for projections of an optimizer's steps")
        if directions == "keep":
            raise ParameterError("directions", "must be regenerate for projections, got keep")

    def passes(self, local_steps: int, num_perturbations: int) -> int:
        """The cost of a client's K gradients, in evaluations of its loss."""
        return GRADIENT * local_steps

    def directions(self, local_steps: int, num_perturbations: int) -> int:
        """P, whatever K is."""
        return num_perturbations

    def message_shapes(self, estimator: Estimator, params: PyTree, clients: int, dtype: Any) -> PyTree:
        """Scalars [C, 1, P]."""
        return jax.ShapeDtypeStruct((clients, 1, estimator.num_perturbations), dtype)

    def measure(self, context: RoundContext, cohort: Cohort, part: Part) -> Measured:
        """Every client's scalars; its progress exists for one piece of the cohort at a time."""
        directions = directions_of(context, 0)

        def piece(own: tuple[PyTree, Array]) -> tuple[Float[Array, "c 1 P"], Float[Array, "c"]]:
            batches, places = own
            progress, losses = self._progress(context, batches)
            return directions.inner(progress, places % context.groups)[:, None], losses

        rows = cohort.batches, part.places
        return Measured(*part.join(in_pieces(piece, rows, context.execution.stream)))

    def ascent(self, context: RoundContext, measured: Measured, aggregate: PyTree) -> Ascent | None:
        """None: Δ is made again."""
        return None

    def _progress(self, context: RoundContext, given: PyTree) -> tuple[PyTree, Float[Array, "c"]]:
        """m_i of some clients, [c, ...] in float32 or wider, and their losses where the round began."""
        eta = context.estimator.rate_at(zo_state(context.server.state).rounds)
        tx = None if self.optimizer is None else self.optimizer(eta)
        start = in_working_dtype(context.params)

        def loss(params: PyTree, batch: Any) -> Float[Array, ""]:
            return context.mean_losses(params, context.fetch(batch))[0]

        def one(batches: PyTree) -> tuple[PyTree, Float[Array, ""]]:
            return progress_of(loss, start, batches, eta, tx)

        batches = context.batches(given)
        # Not a vmap of one where one client is asked for: even that makes convolutions grouped.
        if context.execution.vmapped == 1:
            return lax.map(one, batches)
        return in_pieces(jax.vmap(one), batches, context.execution.vmapped)


def in_working_dtype(params: PyTree) -> PyTree:
    """Parameters in float32 or wider: in bfloat16 small steps would be lost."""
    return jax.tree.map(lambda x: x.astype(working_dtype(x)), params)


def progress_of(
    loss: Callable[[PyTree, Any], Float[Array, ""]],
    start: PyTree,
    batches: PyTree,
    eta: Any,
    tx: optax.GradientTransformation | None = None,
) -> tuple[PyTree, Float[Array, ""]]:
    """The progress (x_r − x_K) / (η_l K) of local steps on ``batches`` [K, ...], and the first loss.

    Args:
      loss: (parameters, batch) → mean loss.
      start: x_r, in float32 or wider.
      batches: a batch for each step.
      eta: η_l.
      tx: the local optimizer at η_l; None is plain SGD.
    """
    steps = jax.tree.leaves(batches)[0].shape[0]
    if steps == 1 and tx is None:
        value, gradient = jax.value_and_grad(loss)(start, jax.tree.map(lambda a: a[0], batches))
        return gradient, value

    def step(carry: tuple[PyTree, Any, PyTree], batch: PyTree) -> tuple[tuple[PyTree, Any, PyTree], Array]:
        local, state, total = carry
        value, gradient = jax.value_and_grad(loss)(local, batch)
        if tx is None:
            # The mean gradient, without a product with η_l and a division by it.
            local = jax.tree.map(lambda x, g: x - eta * g, local, gradient)
            return (local, state, jax.tree.map(jnp.add, total, gradient)), value
        updates, state = tx.update(gradient, state, local)
        return (optax.apply_updates(local, updates), state, jax.tree.map(jnp.subtract, total, updates)), value

    begin = start, () if tx is None else tx.init(start), jax.tree.map(jnp.zeros_like, start)
    (_, _, total), values = lax.scan(step, begin, batches)
    # At a rate of 0 another optimizer makes no progress, and the sum of its updates is 0.
    unit = steps if tx is None else jnp.where(eta == 0, 1, steps * eta)
    return jax.tree.map(lambda x: x / unit, total), values[0]


def projections(optimizer: Callable[[Any], optax.GradientTransformation] | None = None) -> Projections:
    """A client's progress along shared directions, see :class:`Projections`."""
    return Projections(optimizer)
