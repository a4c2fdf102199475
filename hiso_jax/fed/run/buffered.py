"""Asynchronous rounds: an update takes the first B answers of C clients at work, however late they are (FedBuff).

Round r invites B clients, which measure at x_r along the directions of round r, while C − B earlier visits go on; the
first round invites C. The first B visits that end are the row of round r in the ledger. Each answer counts along the
directions of the round in which its visit began, times (1 + τ)^−a if the server made τ updates since then
(arXiv 2106.06639). With B = C every round waits for its whole cohort.

A visit's scalars depend only on x_r, so the simulation measures them at the invitation and holds them until the clock
says that the visit has ended. That is why a run is measured in cohorts, as a synchronous one is, and why the visits at
work are a part of its snapshots.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int8, PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.fed.algorithm import Algorithm
from hiso_jax.fed.keys import channel_key, cohort_key, data_key, round_key, visits_of
from hiso_jax.fed.ledger import RoundRecord
from hiso_jax.fed.measure import Cohort, Keys
from hiso_jax.fed.population import ABSENT, LATE, REPORTED, Participation, sample_cohort
from hiso_jax.fed.round import Arrived, Invite, Late, RoundInputs, Settle
from hiso_jax.fed.run.config import SimulationConfig
from hiso_jax.fed.update import ServerState
from hiso_jax.zo import zo_states

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


def check_buffer(
    algorithm: Algorithm, config: SimulationConfig, params: PyTree, participation: Participation | None = None
) -> None:
    """Refuse an asynchronous run of a method, or with options, that cannot be one; None is any participation.

    Raises:
      ParameterError: there is a buffer, and no fleet; a rule that selects cohorts; a method whose messages are not
        scalars, whose directions depend on the past, or whose messages only count together; or a private run.
    """
    if config.buffer is None:
        return

    def refuse(why: str) -> None:
        raise ParameterError("buffer", f"must not be given {why}")

    if participation is not None and participation.fleet is None:
        raise ParameterError("buffer", "needs a fleet: without the clients' speeds every answer comes at once")
    if participation is not None and participation.select is not None:
        refuse("with a rule that selects cohorts, which reads the losses of the round before")
    if config.backprop_share is not None:
        refuse("with `backprop_share`, whose two kinds of messages are scaled within a cohort")
    if not algorithm.has_scalars:
        refuse("for a method whose messages are not scalars")
    if algorithm.needs_secret or algorithm.is_private:
        refuse("in a private run, whose accounting counts synchronous rounds")
    if not algorithm.combine.linear or algorithm.combine.noise is not None:
        refuse("with a combiner that compares the messages of a cohort, which here have directions of their own")
    state = jax.eval_shape(algorithm.optimizer.init, params)
    if not _has_plain_head(state) or zo_states(state)[0].curvature is not None:
        refuse("for a method whose directions or updates depend on past rounds (decomfl, mosaic, local_mosaic do not)")


def _has_plain_head(state: Any) -> bool:
    """Whether the head of a chain stands in it directly, and not in a wrapper that remembers more."""
    if type(state) is tuple:
        return any(map(_has_plain_head, state))
    return state in zo_states(state)


def late_of(
    config: SimulationConfig, server: ServerState, seed_key: Any, number: Any, version: Array, place: Array
) -> Late:
    """What round ``number`` makes of answers whose visits began in the rounds ``version`` [B] at ``place`` [B]."""
    age = (number - version).astype(jnp.float32)
    return Late(visits_of(seed_key, version, place, server.state), (1 + age) ** -config.staleness_exponent)


class Row(NamedTuple):
    """The visits that a round's row of the ledger holds, [B].

    Attributes:
      cohort, attendance, synced_to, version, place: as in :class:`AtWork`.
      seconds: the simulated duration of the round.
    """

    cohort: Int[Array, "B"]
    attendance: Int8[Array, "B"]
    synced_to: Int[Array, "B"]
    version: Int[Array, "B"]
    place: Int[Array, "B"]
    seconds: Float[Array, ""]


@dataclass(frozen=True)
class Buffer:
    """The two halves of an asynchronous round.

    Attributes:
      config: the configuration.
      answers: the clients' half.
      settle: the server's half.
    """

    config: SimulationConfig
    answers: Invite
    settle: Settle

    def invite(
        self,
        at_work: AtWork,
        server: ServerState,
        synced_to: Int[Array, "N"] | None,
        number: Int[Array, ""],
        inputs: Any,
        attend: Callable[[Int[Array, "B"], Int[Array, "B"]], Any],
        hostile: Callable[[Int[Array, "B"]], Bool[Array, "B"]] | None,
    ) -> tuple[AtWork, Int[Array, "N"] | None]:
        """The visits with those that begin in round r in place of those that ended, and the synced rounds of all.

        Args:
          at_work: the visits.
          server: the server's state.
          synced_to: the round at which each client was last synced.
          number: r.
          inputs: the run's inputs.
          attend: (clients, rounds at which they were last synced) → their attendance.
          hostile: clients → which are hostile; None is no client.
        """
        config, count = self.config, self.config.answers
        whole = inputs.population.num_clients
        candidates = sample_cohort(cohort_key(inputs.seed_key, number), whole, config.cohort)
        keys = Keys(round_key(inputs.seed_key, number), channel_key(inputs.seed_key, number), number)
        given = RoundInputs(inputs.train, (inputs.population, data_key(inputs.seed_key, number)), inputs.frozen)

        def some(turn: Int[Array, ""], before: tuple[AtWork, Any]) -> tuple[AtWork, Any]:
            at_work, synced_to = before
            kept = jax.tree.map(lambda a: a[count:], at_work)
            # A client that is at work is not invited again: of C candidates at most C − B are.
            busy = (candidates[:, None] == kept.clients).any(1)
            clients = candidates[jnp.argsort(busy, stable=True)[:count]]
            last = jnp.full_like(clients, number) if synced_to is None else synced_to[clients]
            attendance = attend(clients, last)
            weights = (attendance.status == REPORTED).astype(jnp.float32)
            cohort = Cohort(clients, weights, clients, None if hostile is None else hostile(clients))
            arrived = self.answers(server, cohort, keys, given, turn * count)
            if synced_to is not None:
                places = jnp.where(attendance.status == ABSENT, len(synced_to), clients)
                synced_to = synced_to.at[places].set(number, mode="drop")
            begun = AtWork(
                clients,
                jnp.full_like(clients, number),
                turn * count + jnp.arange(count, dtype=jnp.int32),
                attendance.status,
                attendance.ends,
                last,
                arrived.messages,
                arrived.valid,
                arrived.losses.astype(kept.losses.dtype),
            )
            return jax.tree.map(lambda old, new: jnp.concatenate([old, new]), kept, begun), synced_to

        turns = jnp.where(number == 0, config.cohort // count, 1)
        return lax.fori_loop(0, turns, some, (at_work, synced_to))

    def take(
        self, at_work: AtWork, server: ServerState, number: Int[Array, ""], inputs: Any
    ) -> tuple[AtWork, ServerState, Row, RoundRecord]:
        """The first B visits to end, and the server after them; see :meth:`invite` for the arguments."""
        config, count = self.config, self.config.answers
        order = jnp.argsort(at_work.ends, stable=True)
        at_work = jax.tree.map(lambda a: a[order], at_work)
        ended = jax.tree.map(lambda a: a[:count], at_work)
        seconds = ended.ends[-1]
        at_work = at_work._replace(ends=at_work.ends - seconds)
        age, status = number - ended.version, ended.status
        if config.max_staleness is not None:
            status = jnp.where((status == REPORTED) & (age > config.max_staleness), LATE, status).astype(jnp.int8)
        weights = (status == REPORTED).astype(jnp.float32)
        if config.weighting == "examples":
            weights *= inputs.population.sizes_of(ended.clients)
        server, record = self.settle(
            server,
            Cohort(ended.clients, weights, ended.clients),
            Keys(round_key(inputs.seed_key, number), channel_key(inputs.seed_key, number), number),
            Arrived(ended.messages, ended.valid & (status == REPORTED), ended.losses),
            late_of(config, server, inputs.seed_key, number, ended.version, ended.place),
        )
        row = Row(ended.clients, status, ended.last_synced, ended.version, ended.place, seconds)
        return at_work, server, row, record
