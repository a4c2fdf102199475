"""The inputs of a run's programs, the state that they carry from round to round, and their log."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8, Key, PyTree

from hiso_jax.fed.ledger import Records, RoundRecord
from hiso_jax.fed.population import ABSENT, AnyPopulation, Participation, SelectionState, no_records
from hiso_jax.fed.run import monitor as monitoring
from hiso_jax.fed.run.config import SimulationConfig
from hiso_jax.fed.run.traffic import NEVER_CAME
from hiso_jax.fed.update import ServerState

NOT_BEGUN = -1


class AtWork(NamedTuple):
    """The visits of a run that began and did not end, [C, ...]; the first B rows ended in the last round.

    Attributes:
      clients: the client ids.
      version: the round in which each visit began; NOT_BEGUN for a row that holds no visit yet.
      place: its place among the clients that this round invited.
      status: its attendance.
      ends: simulated seconds until it ends.
      last_synced: the round at which the client was last synced when it was invited.
      messages: the messages.
      valid: whether they are finite.
      losses: the losses at x of the visit's round.
    """

    clients: Int[Array, "C"]
    version: Int[Array, "C"]
    place: Int[Array, "C"]
    status: Int8[Array, "C"]
    ends: Float[Array, "C"]
    last_synced: Int[Array, "C"]
    messages: PyTree
    valid: Bool[Array, "C"]
    losses: Float[Array, "C"]


def nobody_at_work(config: SimulationConfig, sent: PyTree, dtype: Any) -> AtWork | None:
    """The visits before the first round; None for a synchronous run.

    Args:
      config: the configuration.
      sent: the shapes of the messages of B clients as they arrive, [B, ...].
      dtype: that of a loss.
    """
    if config.buffer is None:
        return None
    # Every array is its own, because a dispatch takes the state by donation.
    clients, version, place, last_synced = (jnp.full(config.cohort, NOT_BEGUN, jnp.int32) for _ in range(4))
    messages = jax.tree.map(lambda x: jnp.zeros((config.cohort, *x.shape[1:]), x.dtype), sent)
    status, ends = jnp.full(config.cohort, ABSENT, jnp.int8), jnp.zeros(config.cohort, jnp.float32)
    valid, losses = jnp.zeros(config.cohort, bool), jnp.zeros(config.cohort, dtype)
    return AtWork(clients, version, place, status, ends, last_synced, messages, valid, losses)


class Rates(NamedTuple):
    """The learning rates that are numbers: arguments of a program, so that runs at other rates share it.

    Attributes:
      server: the rate of the algorithm; None if the algorithm holds it itself.
      local: the rate of the clients' own steps; None if there is none, or a schedule.
    """

    server: float | None = None
    local: float | None = None


class Inputs(NamedTuple):
    """The inputs that a program reads and does not change.

    Attributes:
      seed_key: the run's seed key.
      train: the training examples.
      population: the clients and the training examples that each holds.
      participation: which invited clients come, and how fast they are.
      frozen: the parameters that the model needs beside its trained ones, or None.
      secret: the server's secret key, for cohorts and noise that only the server may know; None for a run without
        secrets.
      rates: the learning rates that are numbers.
    """

    seed_key: Key[Array, ""]
    train: PyTree
    population: AnyPopulation
    participation: Participation
    frozen: PyTree | None = None
    secret: Key[Array, ""] | None = None
    rates: Rates = Rates()


class RunState(NamedTuple):
    """The state that a run carries from round to round on the device.

    Attributes:
      server: parameters, optimizer state and the server's memory.
      monitor: the divergence check.
      synced_to: the round at which each client was last synced, int32 [N]. A population costs only these four bytes
        per client. None if bytes are not counted; no client then counts as having missed a round.
      selection: what a rule that selects cohorts reads; None for uniform cohorts.
      at_work: the visits that began and did not end, in an asynchronous run; else None.
      clock: the simulated seconds so far, for an availability that reads them; else None. They are the sum of the
        recorded seconds of the rounds, in their order.
    """

    server: ServerState
    monitor: monitoring.Monitor
    synced_to: Int[Array, "N"] | None
    selection: SelectionState | None = None
    at_work: AtWork | None = None
    clock: Float[Array, ""] | None = None

    @property
    def kept(self) -> tuple[PyTree, ...]:
        """The trees of a snapshot."""
        return tuple(self.server) if self.at_work is None else (*self.server, self.at_work)


class RoundLog(NamedTuple):
    """The log of a round for the host.

    Attributes:
      cohort: the ids of the invited clients, [C].
      attendance: the status of each, [C].
      synced_to: the round at which each was last synced when it was invited, [C].
      seconds: the simulated duration of the round.
      record: the messages and their aggregate.
      version, place: as in :class:`hiso_jax.fed.Records`.
    """

    cohort: Int[Array, "C"]
    attendance: Int8[Array, "C"]
    synced_to: Int[Array, "C"]
    seconds: Float[Array, ""]
    record: RoundRecord
    version: Int[Array, "C"] | None = None
    place: Int[Array, "C"] | None = None

    def on_host(self) -> "RoundLog":
        """The log of some rounds as NumPy arrays. The loss of a round without a valid client is NaN, not 0."""
        log = jax.tree.map(np.asarray, self)
        loss = np.where(log.record.valid.any(-1), log.record.loss, np.nan).astype(log.record.loss.dtype)
        return log._replace(record=log.record._replace(loss=loss))

    def as_records(self, seed_key: Key[Array, ""], rounds: Any, bytes_up: Any, bytes_down: Any) -> Records:
        """The log of some rounds as the ledger holds it; arrays, or their shapes, have a leading axis R."""
        own: dict[str, Any] = {**self._asdict(), **self.record._asdict()}
        del own["record"], own["synced_to"]
        return Records(seed_key=seed_key, round=rounds, bytes_up=bytes_up, bytes_down=bytes_down, **own)


Dispatch = Callable[[RunState, Any, Any, Inputs], tuple[RunState, RoundLog]]
"""(state, first round, end, inputs) → the state after these rounds, and their log."""


def blank(function: Callable, *arguments: Any) -> PyTree:
    """Zeros in the shapes of a function's result."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *arguments))


def newcomers(clients: int) -> Int[Array, "N"]:
    """``synced_to`` of a population before its first round."""
    return jnp.full(clients, NEVER_CAME, jnp.int32)


def first_selection(participation: Participation, clients: int, cohort: int) -> SelectionState | None:
    """``selection`` before the first round."""
    return None if participation.select is None else no_records(clients, cohort)
