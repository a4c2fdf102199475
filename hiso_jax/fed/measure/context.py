"""The interface of a measure, its inputs in a round, and its outputs."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped

from hiso_jax.factored import PerturbedAs
from hiso_jax.fed.devices import Execution, ExecutionSettings, Part, in_pieces
from hiso_jax.fed.update import ServerState
from hiso_jax.zo import Ascent

Draw = Callable[[PyTree, PyTree], Int[Array, "C K B"]]
"""(source, client ids [C]) → the indices of the examples in the clients' batches."""


class Estimator(NamedTuple):
    """How clients measure in every round.

    Attributes:
      measure: the clients' computation.
      local_steps: K.
      num_perturbations: P.
      mu: the smoothing radius μ.
      local_learning_rate: η of the clients' own steps between measurements, a number or a schedule over rounds.
    """

    measure: "Measure"
    local_steps: int
    num_perturbations: int
    mu: ArrayLike
    local_learning_rate: optax.ScalarOrSchedule | None = None

    @property
    def is_balanced(self) -> bool:
        """Whether the server scales the messages of a mixed cohort to one length."""
        return getattr(self.measure, "is_balanced", lambda local_steps: False)(self.local_steps)

    def rate_at(self, rounds: Int[Array, ""]) -> Any:
        """The rate η of the clients' own steps after ``rounds`` rounds."""
        rate = self.local_learning_rate(rounds) if callable(self.local_learning_rate) else self.local_learning_rate
        return 0.0 if rate is None else rate


class Cohort(NamedTuple):
    """The clients of a round.

    Attributes:
      client_ids: their ids in the population, [C].
      weights: their weights in the aggregate, zero for clients that do not report, [C].
      batches: their batches, a tree of [C, K, B, ...] arrays; or the argument of :attr:`RoundContext.draw`.
      hostile: mask of the clients whose messages an attack forges, [C]; None is no client.
      probing: mask of the clients that cannot backpropagate, for the measure :class:`Mixed`, [C]; None is no client.
    """

    client_ids: Int[Array, "C"]
    weights: Float[Array, "C"]
    batches: PyTree
    hostile: Bool[Array, "C"] | None = None
    probing: Bool[Array, "C"] | None = None


class Keys(NamedTuple):
    """The round's keys, and its number.

    Attributes:
      round: the key of the directions.
      channel: the key of clients' own draws and of the channels of messages.
      number: r.
      secret: the key of private draws of clients and server; None if they make no private draws.
    """

    round: Key[Array, ""]
    channel: Key[Array, ""]
    number: Int[Array, ""]
    secret: Key[Array, ""] | None = None


class RoundContext(NamedTuple):
    """A round before the measurement: the inputs that all clients share.

    Attributes:
      estimator: how the clients measure.
      settings: how the round is computed.
      execution: the number of clients in memory at a time.
      server: parameters x_r, optimizer state and memory.
      cohort: all clients of the round.
      keys: the keys of the round.
      groups: G, the number of groups of directions; each group of clients has separate directions.
      loss: ``(params, batch) → [B]``.
      examples: the training examples if batches are indices into them, else None.
      source: the first argument of ``draw``.
      draw: the function that draws batches, or None if batches are given.
      relay: (one scalar of every client, p) → (the scalars as they arrive, their aggregate): sends one perturbation
        before the next is measured. None if an aggregate needs complete messages.
      sums_only: whether only the weighted mean of the messages is needed.
      is_alone: whether this is the program of one client of a cohort, whose others are elsewhere.
    """

    estimator: Estimator
    settings: ExecutionSettings
    execution: Execution
    server: ServerState
    cohort: Cohort
    keys: Keys
    groups: int
    loss: Callable[[PyTree, Any], Float[Array, "B"]]
    examples: PyTree | None = None
    source: PyTree | None = None
    draw: Draw | None = None
    relay: Callable[[PyTree, Array], tuple[PyTree, PyTree]] | None = None
    sums_only: bool = False
    is_alone: bool = False

    @property
    def params(self) -> PyTree:
        """The server's parameters x_r."""
        return self.server.params

    @property
    def perturbed_as(self) -> PerturbedAs | None:
        """How the model reads parameters perturbed along a direction, see ``hiso_jax.zo.perturb``."""
        return self.settings.perturbed_as

    def batches(self, given: PyTree) -> PyTree:
        """The batches [c, K, B, ...] of some clients, or the indices of their examples, four bytes each."""
        return given if self.draw is None else self.draw(self.source, given)

    def fetch(self, batches: PyTree) -> PyTree:
        """The examples of batches that may be indices."""
        return batches if self.examples is None else jax.tree.map(lambda a: a[batches], self.examples)

    def drawn(self, cohort: PyTree, size: int) -> PyTree:
        """:meth:`batches` of an entire cohort, ``size`` clients at a time."""
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


class Measured(NamedTuple):
    """The measurement of a cohort.

    Attributes:
      messages: the clients' messages, a tree of [C, ...] arrays; None if only their mean was kept.
      losses: the clients' losses at the start of the round, [C].
      sent: the messages as they arrive, if they were sent while they were measured.
      ascent: the aggregate and Δ, if they were computed while the directions were measured.
      kept: the draws of the directions, a tree of [P, ...] arrays, if they are kept for the update.
      mean: the weighted mean of the valid messages, if only the mean was needed.
      valid: mask of the clients whose messages are in ``mean``, [C].
    """

    messages: PyTree[Shaped[Array, "C ..."]] | None
    losses: Float[Array, "C"]
    sent: PyTree[Shaped[Array, "C ..."]] | None = None
    ascent: Ascent | None = None
    kept: PyTree | None = None
    mean: PyTree | None = None
    valid: Bool[Array, "C"] | None = None


@runtime_checkable
class Measure(Protocol):
    """The computation of a client in a round, whose result is its message."""

    @property
    def has_scalars(self) -> bool:
        """Whether a message holds scalars along the round's directions; else it is a tree like the parameters."""
        ...

    @property
    def reads(self) -> tuple[str, ...]:
        """The options of a run that it reads.

        They are among "perturbations", "mu", "difference", "directions" and "local_learning_rate".
        """
        ...

    @property
    def description(self) -> Any:
        """Its entry in a ledger."""
        ...

    def passes(self, local_steps: int, num_perturbations: int) -> int:
        """The number of forward passes that a round costs a client."""
        ...

    def check(self, estimator: Estimator, directions: str | None) -> None:
        """Refuse an estimator or a mode of directions that does not suit.

        Args:
          estimator: how the clients would measure.
          directions: "keep" or "regenerate", as the run's configuration says; None leaves it to the round.

        Raises:
          ParameterError: an option of the run is out of range for this measure.
        """
        ...

    def directions(self, local_steps: int, num_perturbations: int) -> int:
        """The number of directions that a client makes in a round."""
        ...

    def message_shapes(self, estimator: Estimator, params: PyTree, clients: int, dtype: Any) -> PyTree:
        """The shapes of the messages [C, ...] of ``clients`` clients."""
        ...

    def measure(self, context: RoundContext, cohort: Cohort, part: Part) -> Measured:
        """Measure ``cohort``, this device's part of ``context.cohort``; the outputs cover all clients."""
        ...

    def ascent(self, context: RoundContext, measured: Measured, aggregate: PyTree) -> Ascent | None:
        """Δ of an aggregate, if it is available from the measurement; None if it has to be recomputed."""
        ...
