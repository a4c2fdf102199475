"""What goes into a round: how its clients measure, and what they and the server know."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.factored import MovedAs
from hiso_jax.fed.algorithm import Algorithm, Measure
from hiso_jax.fed.devices import ExecutionSettings, in_pieces
from hiso_jax.zo import check_directions, check_estimator

Draw = Callable[[PyTree, PyTree], Int[Array, "C K B"]]
"""(source, clients' numbers [C]) → the numbers of the examples in their batches."""


class Estimator(NamedTuple):
    """How clients measure in every round.

    Attributes:
      measure: what.
      local_steps: K.
      num_perturbations: P.
      mu: the smoothing radius μ.
      local_learning_rate: η of the clients' own steps between measurements, a number or a schedule over rounds.
    """

    measure: Measure
    local_steps: int
    num_perturbations: int
    mu: ArrayLike
    local_learning_rate: optax.ScalarOrSchedule | None = None

    def rate_at(self, rounds: Int[Array, ""]) -> Any:
        """η of the clients' own steps after so many rounds."""
        rate = self.local_learning_rate(rounds) if callable(self.local_learning_rate) else self.local_learning_rate
        return 0.0 if rate is None else rate


def check_round(algorithm: Algorithm, estimator: Estimator, settings: ExecutionSettings) -> None:
    """Refuse a round that cannot be.

    Raises:
      ValueError: a number out of range, K > 1 without a rate for the clients' steps, fewer directions than the method
        makes sense with, or directions kept for K > 1.
    """
    check_estimator(estimator.num_perturbations, estimator.mu)
    if estimator.num_perturbations < algorithm.fewest_perturbations:
        raise ParameterError(
            "perturbations",
            f"must be at least {algorithm.fewest_perturbations} for this method, got {estimator.num_perturbations}",
        )
    if estimator.local_steps < 1:
        raise ParameterError("local_steps", f"must be at least 1, got {estimator.local_steps}")
    if settings.directions is not None:
        check_directions(settings.directions)
    if estimator.local_steps > 1 and algorithm.has_scalars:
        if estimator.local_learning_rate is None:
            raise ParameterError(
                "local_steps", f"is {estimator.local_steps}: the clients' own steps need `local_learning_rate`"
            )
        if settings.directions == "keep":
            raise ParameterError("directions", "must be regenerate for several local steps, got keep")


class Cohort(NamedTuple):
    """The clients of a round.

    Attributes:
      numbers: in the population, [C].
      weights: in the aggregate; zero for those that do not report, [C].
      batches: their batches, a tree of [C, K, B, ...] arrays; or, with ``Data.draw``, what it draws them for.
      hostile: which of them an attack forges the messages of, [C]; None is nobody.
    """

    numbers: Int[Array, "C"]
    weights: Float[Array, "C"]
    batches: PyTree
    hostile: Bool[Array, "C"] | None = None


class Keys(NamedTuple):
    """The round's keys, and its number.

    Attributes:
      round: names the directions.
      channel: of what clients draw for themselves and of what happens to messages.
      number: r.
      secret: of what clients and server draw in private; None if they do not.
    """

    round: Key[Array, ""]
    channel: Key[Array, ""]
    number: Int[Array, ""]
    secret: Key[Array, ""] | None = None


class Data(NamedTuple):
    """Where batches come from.

    Attributes:
      loss: ``(params, batch) → [B]``.
      examples: the training examples if batches are numbers into them, else None.
      source: what ``draw`` draws those numbers from.
      draw: how, or None if the batches are given.
      moved_as: how the model reads parameters moved along a direction, see ``hiso_jax.zo.perturb``.
    """

    loss: Callable[[PyTree, Any], Float[Array, "B"]]
    examples: PyTree | None = None
    source: PyTree | None = None
    draw: Draw | None = None
    moved_as: MovedAs | None = None

    def batches(self, given: PyTree) -> PyTree:
        """The batches of some clients [c, K, B, ...], or the numbers of their examples, four bytes each."""
        return given if self.draw is None else self.draw(self.source, given)

    def fetch(self, batches: PyTree) -> PyTree:
        """The examples themselves."""
        return batches if self.examples is None else jax.tree.map(lambda a: a[batches], self.examples)

    def drawn(self, cohort: PyTree, size: int) -> PyTree:
        """:meth:`batches` of a whole cohort, ``size`` clients at a time."""
        return in_pieces(self.batches, cohort, size)

    def mean_losses(self, params: PyTree, examples: PyTree, clients: int = 1) -> Float[Array, "C"]:
        """The mean loss of each of ``clients`` consecutive, equal parts of ``examples``, in float32 or wider.

        Raises:
          ValueError: the loss is not per example.
        """
        count = jax.tree.leaves(examples)[0].shape[0]
        losses = self.loss(params, examples)
        if losses.shape != (count,):
            raise ValueError(f"a federated task's loss must be per example, shape ({count},) here; got {losses.shape}")
        return losses.astype(jnp.promote_types(losses.dtype, jnp.float32)).reshape(clients, -1).mean(1)
