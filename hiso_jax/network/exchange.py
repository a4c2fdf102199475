"""The messages of a server: what clients are sent in a round, what is taken from them, and who is where."""

import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from hiso_jax import fed
from hiso_jax.fed.ledger import fingerprint, pack_sums, sample, sums_bytes
from hiso_jax.fed.population import ABSENT, DROPPED, LATE, REPORTED
from hiso_jax.fed.run import Arrivals, RemoteRun
from hiso_jax.fed.update import ServerState
from hiso_jax.network.asking import Asking, Begun, Known, Way
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
from hiso_jax.network.settings import NetworkSettings, NobodyCame
from hiso_jax.network.transport import Transport

# How often a client is asked again in one round, and seconds between looks for clients.
TRIES, POLL = 3, 0.2
# Deadlines that a client has to compile its program before the first round.
FIRST = 10
# Seconds that a client may take longer to catch up where that saves bytes.
PATIENCE = 1.0


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
        self._metric_names = parts.metric_names(params)
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
        """The outcome of some visits, with their rounds and places if these are not this round's."""
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
        for client, content in self._collected(asking, outbox, f"round {number}"):
            status[places[client]] = DROPPED if content is None else REPORTED
            if content is not None:
                found[client] = content
        late = [client for client, place in places.items() if status[place] == LATE]
        if late:
            self._notify(f"round {number}: no answer in time of client {', '.join(map(str, late))}")
        return found, status

    def _collected(
        self, asking: Asking, outbox: dict[int, bytes], when: str
    ) -> Iterator[tuple[int, tuple[Any, float] | None]]:
        """The content of every client's answer, or None for a client that is left out; each client answers once.

        Args:
          asking: the clients that are asked, and for what.
          outbox: their messages.
          when: the round or the evaluation, for sentences about clients.
        """
        answered: set[int] = set()
        for client, message in self._transport.exchange(outbox, time.monotonic() + self._network.deadline):
            if client not in asking.places or client in answered:
                continue
            try:
                envelope = opened(message)
                if self._is_of_another(client, message, envelope, asking):
                    continue
                content = self._taken(client, envelope, asking, outbox)
            except BadMessage as error:
                self._notify(f"{when}: client {client} is left out: {error}")
                yield client, None
                continue
            if content is not None:
                answered.add(client)
                yield client, content

    def _is_of_another(self, client: int, message: bytes, envelope: Envelope, asking: Asking) -> bool:
        """Whether a message answers an earlier round, where its client was counted as late."""
        return envelope.round != asking.number

    def evaluate(self, params: Any, test: Any, frozen: Any) -> dict[str, float]:
        """The mean of every metric over the examples that the online clients hold out; NaN if nobody answers.

        Args:
          params, test, frozen: not read; clients evaluate the parameters of the session on their own examples.
        """
        assert self._session is not None
        self._note_rounds()
        number, names, when = self._session.round, self._metric_names, f"evaluation after round {self._session.round}"
        server = ServerState(self._session.params, self._session.state)
        asking = Asking(number, dict.fromkeys(sorted(self._quorum()), 0), server, Kind.EVALUATE)
        outbox = {client: self._first(client, asking) for client in asking.places}
        total, count = np.zeros(len(names)), 0
        for _, content in self._collected(asking, outbox, when):
            if content is not None:
                total, count = total + content[0], count + int(content[1])
        if count == 0:
            self._notify(f"{when}: no client answered in time")
        means = total / count if count else np.full(len(names), np.nan)
        return {name: float(mean) for name, mean in zip(names, means, strict=True)}

    def _sums(self, client: int, content: bytes) -> tuple[np.ndarray, int]:
        """The sums and the number of examples in a client's answer to an evaluation.

        Raises:
          BadMessage: it has another length, or numbers that no examples give.
        """
        form = struct.Struct(f"<I{len(self._metric_names)}d")
        if client not in self._known:
            raise BadMessage("it answers before the server described the run to it")
        if len(content) != form.size:
            raise BadMessage("its sums have another length")
        count, *sums = form.unpack(content)
        # Of n + h examples, of which it trains on n, h are held out.
        share = self._parts.held_out
        most = max(1, round(share / (1 - share) * self._known[client].examples) + 1)
        if not 1 <= count <= most or not np.isfinite(sums).all():
            raise BadMessage("its sums are of no examples, or are not finite")
        return np.asarray(sums), count

    def _asking(self, number: int, places: dict[int, int], server: ServerState) -> Asking:
        """A round while its messages are exchanged; with the marks of its parameters, if it checks the clients'."""
        if not self._network.check_every or number % self._network.check_every:
            return Asking(number, places, server)
        host = jax.tree.map(np.asarray, server.params)
        mark = bytes.fromhex(fingerprint(host))[:FINGERPRINT_BYTES]
        return Asking(number, places, server, mark=mark, sample=sample(host))

    def _begun(self, client: int, asking: Asking) -> Begun:
        """The visit that a client's answer is of."""
        return Begun(asking.number, asking.places[client], 0.0, asking.sample)

    # ------------------------------------------------------------ the messages

    def _sealed(self, kind: Kind, client: int, asking: Asking, content: bytes, flags: int = 0) -> bytes:
        place = asking.places.get(client, 0)
        return sealed(Envelope(kind, self._run, asking.number, client, place, content, flags))

    def _first(self, client: int, asking: Asking) -> bytes:
        """The first message of a round to a client: the run's description, or the invitation."""
        if client not in self._known:
            return self._sealed(Kind.DESCRIBE, client, asking, self._description)
        return self._invitation(client, asking)

    def _invitation(self, client: int, asking: Asking, *, whole: bool = False) -> bytes:
        """The invitation with what is missing: rounds, sums or a checkpoint, of the quick ones the smallest."""
        known, number = self._known[client], asking.number
        follows = known.round <= number and self._histories[known.round] == known.history
        body = self._catch_up(known, asking, whole=whole or not follows)
        begin = known.history if follows else BEGIN
        mark = b"" if asking.mark is None or known.is_other else asking.mark
        content = begin + self._histories[number] + mark + body
        return self._sealed(asking.kind, client, asking, content, HAS_FINGERPRINT if mark else 0)

    def _catch_up(self, known: Known, asking: Asking, *, whole: bool) -> bytes:
        number, costs, speed = asking.number, self._costs, self._network.bytes_a_second
        checkpoint = (CHECKPOINT, lambda: checkpoint_bytes((asking.server.params, asking.server.state)))
        if whole:
            return HEADER.pack(0, CHECKPOINT) + checkpoint[1]()
        missed = self._broadcasts[known.round : number]
        if not missed:
            return HEADER.pack(known.round, 0)
        total, draws = sum(map(len, missed)), len(missed) * costs.replay_draws
        ways = [
            Way(total, draws * known.seconds, len(missed), lambda: b"".join(missed)),
            Way(costs.checkpoint, 0.0, *checkpoint),
        ]
        records = self._session.records_since(0) if costs.pool_seeds and self._session is not None else None
        if records is not None:
            updates, algorithm, state = records.updates, self._parts.algorithm, asking.server.state
            ways.append(
                Way(
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
        self, client: int, envelope: Envelope, asking: Asking, outbox: dict[int, bytes]
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
        self, client: int, envelope: Envelope, asking: Asking, outbox: dict[int, bytes]
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
        asking = Asking(len(self._broadcasts), {}, None)
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


def _seconds(told: float) -> float:
    """A client's word on its speed, within reason."""
    return float(np.clip(told, 0.0, 1e6)) if np.isfinite(told) else 1e6
