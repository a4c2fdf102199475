"""The messages of a server: what clients are sent in a round, what is taken from them, and who is where."""

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from hiso_jax import fed
from hiso_jax.checks import integer, positive
from hiso_jax.fed.ledger import fingerprint, pack_sums, sample, sums_bytes
from hiso_jax.fed.population import ABSENT, DROPPED, LATE, REPORTED
from hiso_jax.fed.run import Arrivals, RemoteRun
from hiso_jax.fed.task import bind, frozen_of
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
from hiso_jax.network.description import are_near_samples, run_of
from hiso_jax.network.envelope import Envelope, Kind, opened, sealed
from hiso_jax.network.history import BEGIN, after
from hiso_jax.network.parts import Parts
from hiso_jax.network.transport import Transport

# How often a client is asked again in one round, and seconds between looks for clients.
TRIES, POLL = 3, 0.2
# Deadlines that a client has to compile its program before the first round.
FIRST = 10
# Seconds that a client may take longer to catch up where that saves bytes.
PATIENCE = 1.0


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Settings of the rounds over a network.

    Attributes:
      deadline: seconds that the clients of a round have to answer; ten times as long before the first round.
      quorum: clients that must be online before a round begins.
      patience: seconds that the server waits for a quorum before it ends the run, which can be resumed.
      check_every: rounds between checks of the clients' parameters; 0 checks none.
      bytes_a_second: the assumed speed of a client's link, by which the way to catch up is chosen.
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


class NobodyCame(RuntimeError):
    """Too few clients were online for too long."""


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


class Begun(NamedTuple):
    """A visit of a client that the server waits for.

    Attributes:
      version: the round to which it was invited.
      place: its place among the clients of this round.
      until: the time, of ``time.monotonic``, at which the server no longer waits.
      sample: a sample of the parameters of this round, if the client's are compared with them.
    """

    version: int
    place: int
    until: float
    sample: Any = None


class MessageExchange(fed.Callback):
    """Brings the messages of the rounds, one round at a call."""

    def __init__(
        self,
        run: RemoteRun,
        parts: Parts,
        clients: int,
        transport: Transport,
        network: NetworkSettings,
        notify: Callable[[str], None],
    ) -> None:
        """See :class:`Server`."""
        super().__init__()
        self._parts, self._clients, self._transport, self._network = parts, clients, transport, network
        self._notify, self._costs, self._cohort_size = notify, run.costs, run.config.cohort
        params = parts.initial()
        self._description = parts.description(params)
        self._run, self._forms = run_of(self._description), parts.forms(params)
        self._sample_bytes = 4 * len(sample(params))
        self._metric_names = _metric_names(parts, params)
        self._known: dict[int, Known] = {}
        self._broadcasts: list[bytes] = []
        self._histories: list[bytes] = [BEGIN]
        self._session: fed.Session | None = None

    def begin(self, session: fed.Session) -> None:
        """Take up the rounds of a resumed run, and tell the clients that are online of the run."""
        self._session = session
        self._note_rounds()
        self._quorum()
        self._greet()

    def _note_rounds(self) -> None:
        """Add the rounds done since to those that clients may have missed."""
        assert self._session is not None
        first = len(self._broadcasts)
        records = self._session.records_since(first)
        if records is None:
            return
        updates = records.updates
        for number in range(first, self._session.round):
            broadcast = broadcast_bytes(updates.between(number, number + 1))
            self._broadcasts.append(broadcast)
            self._histories.append(after(self._histories[-1], broadcast, 1, self._forms.down))

    # ------------------------------------------------------------ the round

    def __call__(self, number: int, order: np.ndarray, server: ServerState) -> Arrivals:
        """The messages of a round, see :data:`hiso_jax.fed.run.Exchange`."""
        self._note_rounds()
        cohort = self._cohort(order)
        found, status = self._exchanged(number, cohort, server)
        return self._arrivals(cohort, status, found)

    def _arrivals(
        self, cohort: np.ndarray, status: np.ndarray, found: dict[int, tuple[Any, float]], visits: Any = None
    ) -> Arrivals:
        """What came of some visits; ``visits`` are their rounds and places, if they are not this round's."""
        form = self._forms.up
        zero = jax.tree.map(np.zeros_like, read_content(bytes(form.row), form))
        rows = [found[client][0] if client in found else zero for client in cohort.tolist()]
        losses = [found[client][1] if client in found else 0.0 for client in cohort.tolist()]
        examples = [self._known[client].examples if client in self._known else 1 for client in cohort.tolist()]
        messages = jax.tree.map(lambda *each: np.stack(each), *rows)
        version, place = (None, None) if visits is None else visits
        losses32 = np.asarray(losses, np.float32)
        return Arrivals(cohort, status, messages, losses32, np.asarray(examples), version, place)

    def _cohort(self, order: np.ndarray) -> np.ndarray:
        """The first C online clients of the round's order; offline clients fill up the places."""
        here = np.isin(order, list(self._quorum()))
        return np.concatenate([order[here], order[~here]])[: self._cohort_size].astype(np.int32)

    def _quorum(self) -> set[int]:
        """The clients that are online, as soon as they are a quorum.

        Raises:
          NobodyCame: fewer than the quorum are online for too long.
        """
        until = time.monotonic() + self._network.patience
        while len(online := self._transport.online() & set(range(self._clients))) < self._network.quorum:
            if time.monotonic() > until:
                raise NobodyCame(
                    f"{len(online)} clients are online and {self._network.quorum} are needed, for "
                    f"{self._network.patience:g} seconds by now"
                )
            time.sleep(POLL)
        return online

    def _exchanged(
        self, number: int, cohort: np.ndarray, server: ServerState
    ) -> tuple[dict[int, tuple[Any, float]], np.ndarray]:
        """Client → its scalars and its loss, of those that answered in time; and the status of every client."""
        places = {int(client): place for place, client in enumerate(cohort)}
        online = self._transport.online()
        status = np.array([LATE if client in online else ABSENT for client in places], np.int8)
        found: dict[int, tuple[Any, float]] = {}
        asking = self._asking(number, places, server)
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
        late = [client for client, place in places.items() if status[place] == LATE]
        if late:
            self._notify(f"round {number}: no answer in time of client {', '.join(map(str, late))}")
        return found, status

    def evaluate(self, params: Any, test: Any, frozen: Any) -> dict[str, np.ndarray]:
        """The mean of every metric over the examples that the online clients hold out; NaN if nobody answers."""
        assert self._session is not None
        self._note_rounds()
        number, names = self._session.round, self._metric_names
        server = ServerState(self._session.params, self._session.state)
        asking = Asking(number, {client: 0 for client in sorted(self._quorum())}, server, None, Kind.EVALUATE)
        outbox = {client: self._first(client, asking) for client in asking.places}
        total, count, answered = np.zeros(len(names)), 0, set()
        for client, message in self._transport.exchange(outbox, time.monotonic() + self._network.deadline):
            if client not in asking.places or client in answered:
                continue
            try:
                envelope = opened(message)
                if envelope.round != number:
                    continue
                found = self._taken(client, envelope, asking, outbox)
            except BadMessage as error:
                self._notify(f"evaluation after round {number}: client {client} is left out: {error}")
                continue
            if found is not None:
                answered.add(client)
                total, count = total + found[0], count + int(found[1])
        if count == 0:
            self._notify(f"evaluation after round {number}: no client answered in time")
        means = total / count if count else np.full(len(names), np.nan)
        return {name: mean[None] for name, mean in zip(names, means, strict=True)}

    def _sums(self, client: int, content: bytes) -> tuple[np.ndarray, int]:
        """The sums and the number of examples in a client's answer to an evaluation.

        Raises:
          BadMessage: it has another length, or numbers that no examples give.
        """
        form = struct.Struct(f"<I{len(self._metric_names)}d")
        if client not in self._known:
            raise BadMessage("it answers before it was told of the run")
        if len(content) != form.size:
            raise BadMessage("its sums have another length")
        count, *sums = form.unpack(content)
        # Of n + h examples, of which it trains on n, h are held out.
        share = self._parts.held_out
        most = max(1, round(share / (1 - share) * self._known[client].examples) + 1)
        if not 1 <= count <= most or not np.isfinite(sums).all():
            raise BadMessage("its sums are of no examples, or are not finite")
        return np.asarray(sums), count

    def _asking(self, number: int, places: dict[int, int], server: ServerState) -> "Asking":
        """The round while its messages are exchanged; with the marks of its parameters, if it checks the clients'."""
        check = self._network.check_every and number % self._network.check_every == 0
        if not check:
            return Asking(number, places, server, None)
        host = jax.tree.map(np.asarray, server.params)
        asking = Asking(number, places, server, bytes.fromhex(fingerprint(host))[:FINGERPRINT_BYTES])
        asking.sample = sample(host)
        return asking

    def _begun(self, client: int, asking: "Asking") -> Begun:
        """The visit that a client's answer is of."""
        return Begun(asking.number, asking.places[client], 0.0, asking.sample)

    # ------------------------------------------------------------ the messages

    def _sealed(self, kind: Kind, client: int, asking: "Asking", content: bytes, flags: int = 0) -> bytes:
        place = asking.places.get(client, 0)
        return sealed(Envelope(kind, self._run, asking.number, client, place, content, flags))

    def _first(self, client: int, asking: "Asking") -> bytes:
        """The first message of a round to a client: the run's description, or the invitation."""
        if client not in self._known:
            return self._sealed(Kind.DESCRIBE, client, asking, self._description)
        return self._invitation(client, asking)

    def _invitation(self, client: int, asking: "Asking", *, whole: bool = False) -> bytes:
        """The invitation with what is missing: rounds, sums or a checkpoint, of the quick ones the smallest."""
        known, number = self._known[client], asking.number
        follows = known.round <= number and self._histories[known.round] == known.history
        body = self._catch_up(known, asking, whole=whole or not follows)
        begin = known.history if follows else BEGIN
        mark = b"" if asking.mark is None or known.is_other else asking.mark
        content = begin + self._histories[number] + mark + body
        return self._sealed(asking.kind, client, asking, content, HAS_FINGERPRINT if mark else 0)

    def _catch_up(self, known: Known, asking: "Asking", *, whole: bool) -> bytes:
        number, costs, speed = asking.number, self._costs, self._network.bytes_a_second
        checkpoint = (CHECKPOINT, lambda: checkpoint_bytes((asking.server.params, asking.server.state)))
        if whole:
            return HEADER.pack(0, CHECKPOINT) + checkpoint[1]()
        missed = self._broadcasts[known.round : number]
        if not missed:
            return HEADER.pack(known.round, 0)
        total, draws = sum(map(len, missed)), len(missed) * costs.replay_draws
        ways = [
            _Way(total, draws * known.seconds, len(missed), lambda: b"".join(missed)),
            _Way(costs.checkpoint, 0.0, *checkpoint),
        ]
        records = self._session.records_since(0) if costs.pool_seeds and self._session is not None else None
        if records is not None:
            updates, algorithm, state = records.updates, self._parts.algorithm, asking.server.state
            ways.append(
                _Way(
                    sums_bytes(costs.pool_seeds),
                    costs.pool_seeds * known.seconds,
                    SUMS,
                    lambda: pack_sums(updates, known.round, number, algorithm, state),
                )
            )
        soonest = min(way.size / speed + way.computing for way in ways)
        soon = [way for way in ways if way.size / speed + way.computing <= soonest + PATIENCE]
        way = min(soon, key=lambda way: way.size)
        return HEADER.pack(known.round, way.number) + way.make()

    def _taken(
        self, client: int, envelope: Envelope, asking: "Asking", outbox: dict[int, bytes]
    ) -> tuple[Any, float] | None:
        """The scalars and the loss in a client's answer; None if the client is asked again, in ``outbox``.

        Raises:
          BadMessage: no honest client of this round sends it.
        """
        if envelope.client != client or envelope.run != self._run:
            raise BadMessage("its message is of another client or another run")
        if envelope.kind is Kind.ANSWER and asking.kind is Kind.INVITE:
            return self._answer(client, envelope, asking, outbox)
        if envelope.kind is Kind.METRICS and asking.kind is Kind.EVALUATE:
            found = self._sums(client, envelope.content)
            known, history = self._known[client], self._histories[asking.number]
            self._known[client] = known._replace(round=asking.number, history=history)
            return found
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
        self, client: int, envelope: Envelope, asking: "Asking", outbox: dict[int, bytes]
    ) -> tuple[Any, float] | None:
        visit = self._begun(client, asking)
        if client not in self._known or envelope.place != visit.place:
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
        known = self._known[client]._replace(round=visit.version, history=self._histories[visit.version])
        if differing:
            if visit.sample is None or not are_near_samples(visit.sample, np.frombuffer(differing, "<f4")):
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

    def _greet(self) -> None:
        """Describe the run to the clients that are online, so that they compile before the first deadline runs."""
        asking = Asking(len(self._broadcasts), {}, None, None)
        outbox = {
            client: self._sealed(Kind.DESCRIBE, client, asking, self._description)
            for client in sorted(self._transport.online())
            if client < self._clients
        }
        for client, message in self._transport.exchange(outbox, time.monotonic() + FIRST * self._network.deadline):
            try:
                envelope = opened(message)
                if envelope.kind is Kind.REFUSED:
                    raise BadMessage(f"it refuses: {envelope.content.decode(errors='replace')}")
                if envelope.kind is Kind.HELLO and envelope.client == client and envelope.run == self._run:
                    self._note_hello(client, envelope.content)
            except BadMessage as error:
                self._notify(f"client {client} is left out: {error}")


def _metric_names(parts: Parts, params: Any) -> list[str]:
    """The names of the task's metrics, in the order in which clients send their sums."""
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), parts.task.train)
    return sorted(jax.eval_shape(bind(parts.task.metrics, frozen_of(parts.task)), params, batch))


def _seconds(told: float) -> float:
    """A client's word on its speed, within reason."""
    return float(np.clip(told, 0.0, 1e6)) if np.isfinite(told) else 1e6


class _Way(NamedTuple):
    """A way to catch a client up.

    Attributes:
      size: its bytes.
      computing: seconds that it takes the client to apply it.
      number: the number in the header of the message.
      make: makes the bytes.
    """

    size: int
    computing: float
    number: int
    make: Callable[[], bytes]


class Asking:
    """A round while its messages are exchanged."""

    def __init__(
        self, number: int, places: dict[int, int], server: Any, mark: bytes | None, kind: Kind = Kind.INVITE
    ) -> None:
        self.number, self.places, self.server, self.mark, self.kind = number, places, server, mark, kind
        self.sample: Any = None
        self.tries: dict[int, int] = {}
