"""Asynchronous rounds: an update takes the first B answers of C clients at work, however late they are (FedBuff).

Round r invites B clients, which measure at x_r along the directions of round r, while C − B earlier visits go on; the
first round invites C. The first B visits that end are the row of round r in the ledger. Each answer counts along the
directions of the round in which its visit began, times (1 + τ)^−a if the server made τ updates since then
(arXiv 2106.06639). With B = C every round waits for its whole cohort.

A visit's scalars depend only on x_r, so the simulation measures them at the invitation and holds them until the clock
says that the visit has ended. That is why a run is measured in cohorts, as a synchronous one is, and why the visits at
work are a part of its snapshots.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.fed.algorithm import Algorithm
from hiso_jax.fed.devices import on_all_devices
from hiso_jax.fed.keys import channel_key, cohort_key, data_key, round_key, visits_of
from hiso_jax.fed.ledger import RoundRecord
from hiso_jax.fed.measure import Cohort, Keys
from hiso_jax.fed.population import ABSENT, LATE, REPORTED, Participation, sample_cohort
from hiso_jax.fed.round import Arrived, Invite, Late, RoundInputs, Settle
from hiso_jax.fed.run import monitor as monitoring
from hiso_jax.fed.run.config import SimulationConfig
from hiso_jax.fed.run.invitation import attendance_of, hostile_in
from hiso_jax.fed.run.state import AtWork, Dispatch, Inputs, RoundLog, RunState, blank
from hiso_jax.fed.run.traffic import Costs
from hiso_jax.fed.update import ServerState
from hiso_jax.zo import zo_states


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
    """The directions and the discounts of B answers that round ``number`` takes.

    Args:
      config: the configuration.
      server: the server's state.
      seed_key: the run's seed key.
      number: the round.
      version: the rounds in which their visits began, [B].
      place: their places among the clients that those rounds invited, [B].
    """
    age = (number - version).astype(jnp.float32)
    return Late(visits_of(seed_key, version, place, server.state), (1 + age) ** -config.staleness_exponent)


@dataclass(frozen=True)
class Buffer:
    """The two halves of an asynchronous round.

    Attributes:
      config: the configuration.
      costs: the costs of a client's visit.
      answers: the clients' half.
      settle: the server's half.
    """

    config: SimulationConfig
    costs: Costs
    answers: Invite
    settle: Settle

    def invite(
        self,
        at_work: AtWork,
        server: ServerState,
        synced_to: Int[Array, "N"] | None,
        clock: Array | None,
        number: Array,
        inputs: Inputs,
    ) -> AtWork:
        """The visits with those that begin in round r in place of those that ended.

        Args:
          at_work: the visits.
          server: the server's state.
          synced_to: the round at which each client was last synced; None counts no missed rounds.
          clock: the simulated seconds so far; None if nobody reads them.
          number: r.
          inputs: the run's inputs.
        """
        config, count = self.config, self.config.answers
        whole = inputs.population.num_clients
        candidates = sample_cohort(cohort_key(inputs.seed_key, number), whole, config.cohort)
        keys = Keys(round_key(inputs.seed_key, number), channel_key(inputs.seed_key, number), number)
        given = RoundInputs(inputs.train, (inputs.population, data_key(inputs.seed_key, number)), inputs.frozen)

        def some(turn: Int[Array, ""], at_work: AtWork) -> AtWork:
            kept = jax.tree.map(lambda a: a[count:], at_work)
            # A client that is at work is not invited again: of C candidates at most C − B are.
            busy = (candidates[:, None] == kept.clients).any(1)
            clients = candidates[jnp.argsort(busy, stable=True)[:count]]
            last = jnp.full_like(clients, number) if synced_to is None else synced_to[clients]
            attendance = attendance_of(config, self.costs, clients, last, number, inputs, clock)
            weights = (attendance.status == REPORTED).astype(jnp.float32)
            hostile = hostile_in(config, inputs, clients) if config.attackers else None
            arrived = self.answers(server, Cohort(clients, weights, clients, hostile), keys, given, turn * count)
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
            return jax.tree.map(lambda old, new: jnp.concatenate([old, new]), kept, begun)

        turns = jnp.where(number == 0, config.cohort // count, 1)
        return lax.fori_loop(0, turns, some, at_work)

    def take(
        self, at_work: AtWork, server: ServerState, number: Array, inputs: Inputs
    ) -> tuple[AtWork, ServerState, AtWork, RoundRecord]:
        """The server's update from the first B visits to end; see :meth:`invite` for the arguments.

        Returns:
          The visits, with their times from now on; the server; the B visits of this round, [B, ...], whose status is
          LATE where an answer is too old; and the record of the round, which took as long as the last of them.
        """
        config, count = self.config, self.config.answers
        order = jnp.argsort(at_work.ends, stable=True)
        at_work = jax.tree.map(lambda a: a[order], at_work)
        ended = jax.tree.map(lambda a: a[:count], at_work)
        at_work = at_work._replace(ends=at_work.ends - ended.ends[-1])
        if config.max_staleness is not None:
            late = (ended.status == REPORTED) & (number - ended.version > config.max_staleness)
            ended = ended._replace(status=jnp.where(late, LATE, ended.status).astype(jnp.int8))
        weights = (ended.status == REPORTED).astype(jnp.float32)
        if config.weighting == "examples":
            weights *= inputs.population.sizes_of(ended.clients)
        server, record = self.settle(
            server,
            Cohort(ended.clients, weights, ended.clients),
            Keys(round_key(inputs.seed_key, number), channel_key(inputs.seed_key, number), number),
            Arrived(ended.messages, ended.valid & (ended.status == REPORTED), ended.losses),
            late_of(config, server, inputs.seed_key, number, ended.version, ended.place),
        )
        return at_work, server, ended, record


Live = tuple[ServerState, monitoring.Monitor, AtWork]


def _live(
    buffer: Buffer, run: Live, synced_to: Array | None, clock: Array | None, number: Array, inputs: Inputs
) -> tuple[Live, RoundLog]:
    """An asynchronous round: clients are invited, and the server takes the first answers."""
    server, monitor, at_work = run
    at_work = buffer.invite(at_work, server, synced_to, clock, number, inputs)
    at_work, server, ended, record = buffer.take(at_work, server, number, inputs)
    monitor = monitoring.watch(monitor, number, record, ended.status == REPORTED, server.params, server.state)
    seconds = ended.ends[-1]
    log = RoundLog(ended.clients, ended.status, ended.last_synced, seconds, record, ended.version, ended.place)
    return (server, monitor, at_work), log


def make_buffered_dispatch(buffer: Buffer, length: int, mesh: Mesh | None = None) -> Dispatch:
    """A program for up to ``length`` asynchronous rounds; see :func:`hiso_jax.fed.run.dispatch.make_dispatch`."""

    def dispatch(
        carry: RunState, begin: Int[Array, ""], end: Int[Array, ""], inputs: Inputs
    ) -> tuple[RunState, RoundLog]:
        living = jax.jit(partial(_live, buffer))

        def step(carry: RunState, number: Array) -> tuple[RunState, RoundLog]:
            assert carry.at_work is not None

            def idle(run: Live, *others: Any) -> tuple[Live, RoundLog]:
                return run, blank(living, run, *others)[1]

            lives = (number < end) & (carry.monitor.diverged_at == monitoring.NEVER)
            run, synced_to = (carry.server, carry.monitor, carry.at_work), carry.synced_to
            (server, monitor, at_work), log = lax.cond(lives, living, idle, run, synced_to, carry.clock, number, inputs)
            if synced_to is not None:
                # Outside any conditional, so that the array [N] is updated in place and never copied.
                came = (at_work.version == number) & (at_work.status != ABSENT)
                places = jnp.where(came, at_work.clients, len(synced_to))
                synced_to = synced_to.at[places].set(number, mode="drop")
            clock = None if carry.clock is None else carry.clock + log.seconds
            return RunState(server, monitor, synced_to, None, at_work, clock), log

        return lax.scan(step, carry, begin + jnp.arange(length, dtype=jnp.int32))

    return on_all_devices(dispatch, mesh)
