"""The server of a federation: it invites clients, takes their messages, and runs the same session as a simulation.

A network is a dispatch of one round: ledger, evaluations, warnings, snapshots and resuming are those of every run.
"""

import logging
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from hiso_jax import fed
from hiso_jax.checks import ParameterError, integer, positive
from hiso_jax.fed.algorithm import are_finite
from hiso_jax.fed.devices import Placement, longest_axis, memory_budget
from hiso_jax.fed.keys import channel_key, cohort_key, round_key
from hiso_jax.fed.ledger import Storage, Updates, fingerprint, sample
from hiso_jax.fed.ledger.seed_sums import pack_sums, sums_bytes
from hiso_jax.fed.measure import Cohort, Keys
from hiso_jax.fed.population import (
    ABSENT,
    DROPPED,
    LATE,
    REPORTED,
    Participation,
    RemotePopulation,
    permute,
)
from hiso_jax.fed.round import Arrived, server_settle
from hiso_jax.fed.run import RunSpec, as_callbacks
from hiso_jax.fed.run import monitor as monitoring
from hiso_jax.fed.run.dispatch import Inputs, RoundLog, RunState
from hiso_jax.fed.run.prepared import PreparedRun, prepare
from hiso_jax.fed.run.programs import costs_of
from hiso_jax.fed.run.secret import secret_of
from hiso_jax.fed.run.session import Callback, Session
from hiso_jax.fed.task_checks import check_given
from hiso_jax.fed.update import ServerState
from hiso_jax.network.catch_up import (
    CHECKPOINT,
    HEADER,
    SUMS,
    BadMessage,
    broadcast_bytes,
    checkpoint_bytes,
    read_content,
)
from hiso_jax.network.client import DIFFERS, FINGERPRINT_BYTES, GREETING, HAS_FINGERPRINT, STANDING
from hiso_jax.network.description import are_near, run_of
from hiso_jax.network.envelope import Envelope, Kind, opened, sealed
from hiso_jax.network.history import BEGIN, after
from hiso_jax.network.parts import Parts
from hiso_jax.network.transport import Transport

logger = logging.getLogger("hiso_jax")
# How often a client is asked again in one round.
TRIES = 3


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Settings of the rounds over a network.

    Attributes:
      deadline: seconds that the clients of a round have to answer.
      quorum: clients that must be online before a round begins.
      patience: seconds that the server waits for a quorum before it ends the run, which can be resumed.
      check_every: rounds between checks of the clients' parameters; 0 checks none.
      bytes_a_second: the assumed speed of a client's link, by which the quickest way to catch up is chosen.
    """

    deadline: float = 60.0
    quorum: int = 1
    patience: float = 3600.0
    check_every: int = 5
    bytes_a_second: float = 1e6

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
          ParameterError: a number is out of range.
        """
        for name in ("deadline", "patience", "bytes_a_second"):
            positive(name, getattr(self, name))
        integer("quorum", self.quorum, 1)
        integer("check_every", self.check_every, 0)


class _Remote:
    """A task whose training examples are elsewhere: one example of zeros has their shapes."""

    def __init__(self, task: Any) -> None:
        self._task = task
        self.train = jax.tree.map(lambda a: np.zeros((1, *a.shape[1:]), a.dtype), task.train)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)


class Known(NamedTuple):
    """What the server believes of a client; the client knows better.

    Attributes:
      examples: the number of its examples.
      seconds: seconds that a direction takes it.
      round, history: where it stands.
      is_other: whether its parameters differ by rounding, as on another processor.
    """

    examples: int
    seconds: float
    round: int
    history: bytes
    is_other: bool = False


class Server:
    """A run whose clients are reached by a transport.

    Args:
      parts: the parts of the run; of its task only the test examples are read, and the shapes of training examples.
      transport: the way to the clients.
      clients: N, the number of clients, whose numbers are 0 to N − 1.
      network: settings of the rounds.
      storage: the directory that keeps the run; None keeps it in memory.
      callbacks: as those of :class:`hiso_jax.fed.Simulation`.
      notify: receives sentences about clients that come, are refused or differ.

    Raises:
      ParameterError: the method or a setting does not suit a network.
    """

    def __init__(
        self,
        parts: Parts,
        transport: Transport,
        *,
        clients: int,
        network: NetworkSettings | None = None,
        storage: Storage | Path | str | None = None,
        callbacks: fed.Callbacks = (),
        notify: Callable[[str], None] = logger.info,
    ) -> None:
        """Check the run; :meth:`run` compiles its programs."""
        check_given(parts.task)
        network = network or NetworkSettings()
        integer("clients", clients, 1)
        if parts.config.cohort > clients:
            raise ParameterError(
                "cohort", f"must be at most the number of clients, {clients}, got {parts.config.cohort}"
            )
        if network.quorum > clients:
            raise ParameterError("quorum", f"must be at most the number of clients, {clients}, got {network.quorum}")
        if parts.algorithm.is_private and not parts.config.public_cohorts:
            raise ParameterError("public_cohorts", "must be given over a network: clients know whom they meet there")
        if isinstance(storage, Path | str):
            storage = Storage(storage)
        config = replace(parts.config, rounds_per_dispatch=1)
        shapes = jax.eval_shape(parts.task.init, jax.random.key(0))
        parts.forms(shapes)
        given = RunSpec(_Remote(parts.task), shapes, RemotePopulation(np.ones(clients, np.int32)), Participation())
        secret = secret_of(storage, None) if parts.algorithm.needs_secret else None
        budget = config.memory_budget or memory_budget()
        self._prepared = prepare(given, parts.algorithm, config, Placement(None, longest_axis), budget, secret)
        self._rounds = Rounds(self._prepared, parts, transport, network, notify)
        self._storage, self._callbacks, self._stop = storage, as_callbacks(callbacks), False

    def stop(self) -> None:
        """Ask a running :meth:`run` to end after the round in flight."""
        self._stop = True

    def run(self) -> fed.Result:
        """Run to the last round, to divergence, or until :meth:`stop`; a storage with ``resume`` continues its run.

        Raises:
          ValueError: the directory holds another run, an altered run, or a run that is being written.
          NobodyCame: too few clients were online for too long; the rounds so far are kept.
          OSError: the directory cannot be written.
        """
        callbacks = (self._rounds, *self._callbacks)
        for callback in self._callbacks:
            callback.open()
        try:
            with Session.begin(
                self._prepared, self._storage, callbacks, lambda: self._stop, dispatch=self._rounds
            ) as session:
                return session.run()
        finally:
            for callback in self._callbacks:
                callback.close()


class NobodyCame(RuntimeError):
    """Too few clients were online for too long."""


class Rounds(Callback):
    """The dispatch of a run over a network: one round at a call."""

    def __init__(
        self,
        prepared: PreparedRun,
        parts: Parts,
        transport: Transport,
        network: NetworkSettings,
        notify: Callable[[str], None],
    ) -> None:
        """See :class:`Server`."""
        super().__init__()
        self._prepared, self._parts, self._transport, self._network = prepared, parts, transport, network
        self._notify = notify
        params = parts.initial()
        self._description = parts.description(params)
        self._run, self._forms = run_of(self._description), parts.forms(params)
        self._sample_bytes = 4 * len(sample(params))
        state = jax.eval_shape(parts.algorithm.optimizer.init, params)
        self._costs = costs_of(parts.algorithm, parts.estimator, ServerState(params, state), prepared.config.cohort)
        self._known: dict[int, Known] = {}
        self._broadcasts: list[bytes] = []
        self._histories: list[bytes] = [BEGIN]
        self._settle = jax.jit(self._settled)
        self._order = jax.jit(lambda key: permute(key, jnp.arange(prepared.clients, dtype=jnp.int32), prepared.clients))

    def begin(self, session: Session) -> None:
        """Take up the rounds of a resumed run, and tell the clients that are online of the run."""
        self._session, records = session, session.records
        if records is not None:
            self._note(records.updates)
        self._greet()

    # ------------------------------------------------------------ the round

    def __call__(self, carry: RunState, begin: Any, end: Any, inputs: Inputs) -> tuple[RunState, RoundLog]:
        """A round, as :data:`hiso_jax.fed.run.dispatch.Dispatch` runs many."""
        number, before = int(begin), time.monotonic()
        cohort = self._cohort(number, inputs)
        arrived, status = self._exchanged(number, cohort, carry.server)
        sizes = [self._known[client].examples if client in self._known else 1 for client in cohort.tolist()]
        weighted = self._prepared.config.weighting == "examples"
        weights = np.where(status == REPORTED, sizes if weighted else 1, 0).astype(np.float32)
        server, monitor, record = self._settle(
            carry.server, carry.monitor, jnp.int32(number), jnp.asarray(cohort), jnp.asarray(weights),
            jnp.asarray(status == REPORTED), jax.tree.map(jnp.asarray, arrived), inputs,
        )  # fmt: skip
        assert carry.synced_to is not None
        last = np.asarray(carry.synced_to)[cohort]
        came = cohort[status != ABSENT]
        seconds = np.float32(time.monotonic() - before)
        log = RoundLog(*map(jnp.asarray, (cohort, status, last, seconds)), record)
        applied = record.valid.any() if record.applied is None else record.applied
        one = jax.tree.map(lambda a: np.asarray(a)[None], record.aggregate)
        self._note(Updates(inputs.seed_key, np.array([number]), one, np.asarray(applied)[None], len(cohort)))
        carry = carry._replace(server=server, monitor=monitor, synced_to=carry.synced_to.at[came].set(number))
        return carry, jax.tree.map(lambda a: np.asarray(a)[None], log)

    def _settled(
        self,
        server: ServerState,
        monitor: monitoring.Monitor,
        number: Any,
        clients: Any,
        weights: Any,
        reported: Any,
        arrived: tuple[PyTree, Any],
        inputs: Inputs,
    ) -> tuple[ServerState, monitoring.Monitor, Any]:
        algorithm, prepared = self._parts.algorithm, self._prepared
        secret = None if inputs.secret is None else channel_key(inputs.secret, number)
        keys = Keys(round_key(inputs.seed_key, number), channel_key(inputs.seed_key, number), number, secret)
        messages, losses = arrived
        valid = reported & are_finite(messages)
        if algorithm.needs_secret:
            losses = jnp.zeros_like(losses)
        else:
            valid &= jnp.isfinite(losses)
        settle = server_settle(algorithm, prepared.estimator, prepared.settings)
        cohort = Cohort(clients, weights, clients)
        server, record = settle(server, cohort, keys, Arrived(messages, valid, losses))
        monitor = monitoring.watch(
            monitor, number, record, reported, server.params, server.state, algorithm.needs_secret
        )
        return server, monitor, record

    def _cohort(self, number: int, inputs: Inputs) -> np.ndarray:
        """The first C online clients of the round's permutation; offline clients fill up the places.

        Raises:
          NobodyCame: fewer than the quorum are online for too long.
        """
        order = np.asarray(self._order(cohort_key(inputs.seed_key, number)))
        until = time.monotonic() + self._network.patience
        while len(online := self._transport.online() & set(range(self._prepared.clients))) < self._network.quorum:
            if time.monotonic() > until:
                raise NobodyCame(
                    f"{len(online)} clients are online and {self._network.quorum} are needed, for "
                    f"{self._network.patience:g} seconds by now"
                )
            time.sleep(0.2)
        here = np.isin(order, list(online))
        return np.concatenate([order[here], order[~here]])[: self._prepared.config.cohort].astype(np.int32)

    def _exchanged(self, number: int, cohort: np.ndarray, server: ServerState) -> tuple[tuple[PyTree, Any], np.ndarray]:
        """The messages of a round with the losses, zeros where none came, and the status of every client."""
        places = {int(client): place for place, client in enumerate(cohort)}
        online = self._transport.online()
        status = np.array([LATE if client in online else ABSENT for client in places], np.int8)
        found: dict[int, tuple[Any, float]] = {}
        check = self._network.check_every and number % self._network.check_every == 0
        host = jax.tree.map(np.asarray, server.params) if check else None
        mark = None if host is None else bytes.fromhex(fingerprint(host))[:FINGERPRINT_BYTES]
        asking = _Asking(number, places, server, mark)
        outbox = {client: self._first(client, asking) for client in places if client in online}
        for client, message in self._transport.exchange(outbox, time.monotonic() + self._network.deadline):
            if client not in places or client in found:
                continue
            try:
                # Answers to an earlier round are late: they were counted there.
                envelope = opened(message)
                if envelope.round != number:
                    continue
                content = self._taken(client, envelope, asking, outbox)
            except BadMessage as error:
                self._notify(f"round {number}: client {client} is left out: {error}")
                status[places[client]] = DROPPED
                continue
            if content is not None:
                found[client] = content
                status[places[client]] = REPORTED
        return self._stacked(found, places), status

    def _stacked(self, found: dict[int, tuple[Any, float]], places: dict[int, int]) -> tuple[PyTree, Any]:
        form = self._forms.up
        empty = read_content(bytes(form.row), form)
        zero = jax.tree.map(np.zeros_like, empty)
        rows = [found[client][0] if client in found else zero for client in places]
        losses = np.array([found[client][1] if client in found else 0.0 for client in places], np.float32)
        return jax.tree.map(lambda *each: np.stack(each), *rows), losses

    # ------------------------------------------------------------ the messages

    def _sealed(self, kind: Kind, client: int, asking: "_Asking", content: bytes, flags: int = 0) -> bytes:
        place = asking.places.get(client, 0)
        return sealed(Envelope(kind, self._run, asking.number, client, place, content, flags))

    def _first(self, client: int, asking: "_Asking") -> bytes:
        """The first message of a round to a client: the run's description, or the invitation."""
        if client not in self._known:
            return self._sealed(Kind.DESCRIBE, client, asking, self._description)
        return self._invitation(client, asking)

    def _invitation(self, client: int, asking: "_Asking", *, whole: bool = False) -> bytes:
        """The invitation with what is missing: rounds, sums or a checkpoint, whichever takes the client least time."""
        known, number = self._known[client], asking.number
        follows = known.round <= number and self._histories[known.round] == known.history
        body = self._catch_up(known, asking, whole=whole or not follows)
        begin = known.history if follows else BEGIN
        mark = b"" if asking.mark is None or known.is_other else asking.mark
        content = begin + self._histories[number] + mark + body
        return self._sealed(Kind.INVITE, client, asking, content, HAS_FINGERPRINT if mark else 0)

    def _catch_up(self, known: Known, asking: "_Asking", *, whole: bool) -> bytes:
        number, costs, speed = asking.number, self._costs, self._network.bytes_a_second
        checkpoint = (CHECKPOINT, lambda: checkpoint_bytes((asking.server.params, asking.server.state)))
        if whole:
            return HEADER.pack(0, CHECKPOINT) + checkpoint[1]()
        missed = self._broadcasts[known.round : number]
        ways: list[tuple[float, int, Callable[[], bytes]]] = [
            (
                sum(map(len, missed)) / speed + len(missed) * costs.replay_draws * known.seconds,
                len(missed),
                lambda: b"".join(missed),
            ),
            (costs.checkpoint / speed, *checkpoint),
        ]
        records = None if self._session is None else self._session.records
        if costs.pool_seeds and records is not None and number > known.round:
            updates, algorithm = records.updates, self._parts.algorithm
            ways.append(
                (
                    sums_bytes(costs.pool_seeds) / speed + costs.pool_seeds * known.seconds,
                    SUMS,
                    lambda: pack_sums(updates, known.round, number, algorithm, asking.server.state),
                )
            )
        # A client that missed nothing is sent nothing.
        _, count, made = min(ways, key=lambda way: way[0]) if missed else ways[0]
        return HEADER.pack(known.round, count) + made()

    def _taken(
        self, client: int, envelope: Envelope, asking: "_Asking", outbox: dict[int, bytes]
    ) -> tuple[Any, float] | None:
        """The scalars and the loss in a client's answer; None if the client is asked again, in ``outbox``.

        Raises:
          BadMessage: no honest client of this round sends it.
        """
        if envelope.client != client or envelope.run != self._run:
            raise BadMessage("its message is of another client or another run")
        if envelope.kind is Kind.ANSWER:
            return self._answer(client, envelope, asking, outbox)
        asking.tries[client] = asking.tries.get(client, 0) + 1
        if asking.tries[client] > TRIES:
            raise BadMessage(f"it was asked {TRIES} times in one round")
        if envelope.kind is Kind.HELLO:
            self._note_hello(client, envelope.content)
            outbox[client] = self._invitation(client, asking)
        elif envelope.kind is Kind.STANDS and client in self._known:
            self._note_standing(client, envelope.content)
            outbox[client] = self._invitation(client, asking)
        elif envelope.kind is Kind.REFUSED:
            sentence = envelope.content.decode(errors="replace")
            if client not in self._known:
                raise BadMessage(f"it refuses: {sentence}")
            # It may have begun anew, and not know the run; a second refusal counts.
            del self._known[client]
            self._notify(f"round {asking.number}: client {client} refuses: {sentence}")
            outbox[client] = self._sealed(Kind.DESCRIBE, client, asking, self._description)
        else:
            raise BadMessage(f"it answers with a message of kind {envelope.kind.name}")
        return None

    def _answer(
        self, client: int, envelope: Envelope, asking: "_Asking", outbox: dict[int, bytes]
    ) -> tuple[Any, float] | None:
        if client not in self._known or envelope.place != asking.places[client]:
            raise BadMessage("it answers for a place that is not its own")
        private, content = self._parts.algorithm.needs_secret, envelope.content
        differing = b""
        if envelope.flags & DIFFERS:
            content, differing = content[: -self._sample_bytes], content[-self._sample_bytes :]
        if not private:
            if len(content) < 4:
                raise BadMessage("its message ends before its loss")
            loss, content = struct.unpack_from("<f", content)[0], content[4:]
        numbers = read_content(content, self._forms.up)
        known = self._known[client]._replace(round=asking.number, history=self._histories[asking.number])
        if differing:
            if not are_near(asking.server.params, np.frombuffer(differing, "<f4")):
                asking.tries[client] = asking.tries.get(client, 0) + 1
                if asking.tries[client] > TRIES:
                    raise BadMessage("its parameters are far from the run's, also after a checkpoint")
                self._notify(f"round {asking.number}: client {client} has other parameters; it is sent a checkpoint")
                self._known[client] = known
                outbox[client] = self._invitation(client, asking, whole=True)
                return None
            if not known.is_other:
                self._notify(f"client {client} computes other last bits, as another processor does; it may stay")
            known = known._replace(is_other=True)
        self._known[client] = known
        return numbers, 0.0 if private else loss

    def _note_hello(self, client: int, content: bytes) -> None:
        if len(content) != GREETING.size + STANDING.size:
            raise BadMessage("its greeting has another length")
        examples, seconds = GREETING.unpack_from(content)
        if not 1 <= examples < 2**31:
            raise BadMessage(f"it holds between 1 and 2³¹ − 1 examples, and says {examples}")
        self._known[client] = Known(examples, _seconds(seconds), 0, BEGIN)
        self._note_standing(client, content[GREETING.size :])
        self._notify(f"client {client} is here with {examples:,} examples")

    def _note_standing(self, client: int, content: bytes) -> None:
        if len(content) != STANDING.size:
            raise BadMessage("its standing has another length")
        number, seconds, history = STANDING.unpack(content)
        self._known[client] = self._known[client]._replace(
            round=number if number < len(self._histories) else 2**31, seconds=_seconds(seconds), history=history
        )

    def _note(self, updates: Updates) -> None:
        """Add rounds to those that clients may have missed."""
        first = int(updates.round[0])
        for row in range(len(updates.round)):
            broadcast = broadcast_bytes(updates.between(first + row, first + row + 1))
            self._broadcasts.append(broadcast)
            self._histories.append(after(self._histories[-1], broadcast, 1, self._forms.down))

    def _greet(self) -> None:
        """Describe the run to the clients that are online, so that they compile before the first deadline runs."""
        asking = _Asking(len(self._broadcasts), {}, None, None)
        outbox = {
            client: self._sealed(Kind.DESCRIBE, client, asking, self._description)
            for client in sorted(self._transport.online())
            if client < self._prepared.clients
        }
        for client, message in self._transport.exchange(outbox, time.monotonic() + self._network.patience):
            try:
                envelope = opened(message)
                if envelope.kind is Kind.REFUSED:
                    raise BadMessage(f"it refuses: {envelope.content.decode(errors='replace')}")
                if envelope.kind is Kind.HELLO and envelope.client == client and envelope.run == self._run:
                    self._note_hello(client, envelope.content)
            except BadMessage as error:
                self._notify(f"client {client} is left out: {error}")

    _session: Session | None = None


def _seconds(told: float) -> float:
    """A client's word on its speed, within reason."""
    return float(np.clip(told, 0.0, 1e6)) if np.isfinite(told) else 1e6


class _Asking:
    """A round while its messages are exchanged."""

    def __init__(self, number: int, places: dict[int, int], server: Any, mark: bytes | None) -> None:
        self.number, self.places, self.server, self.mark = number, places, server, mark
        self.tries: dict[int, int] = {}
