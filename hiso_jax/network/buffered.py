"""Asynchronous rounds over a network: a round takes the first B answers, however old their invitations are.

The server keeps C clients at work. A round invites as many as the round before has taken, and ends when B visits have:
with an answer, with none that counts, or late, which is a deadline after their invitation.
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from hiso_jax.fed.population import ABSENT, DROPPED, LATE, REPORTED
from hiso_jax.fed.run import Arrivals
from hiso_jax.fed.update import ServerState
from hiso_jax.network.asking import Asking, Begun
from hiso_jax.network.catch_up import BadMessage
from hiso_jax.network.envelope import Envelope, Kind, opened
from hiso_jax.network.exchange import POLL, MessageExchange


class _Ended(NamedTuple):
    """A visit that ended: its client, what was known of it, its status and, if it counts, its scalars and loss."""

    client: int
    visit: Begun
    status: int
    content: tuple[Any, float] | None = None


class BufferedExchange(MessageExchange):
    """Brings the answers of asynchronous rounds, B at a call."""

    def __init__(self, *given: Any) -> None:
        """See :class:`hiso_jax.network.Server`."""
        super().__init__(*given)
        config = self._parts.config
        self._most, self._takes = config.cohort, config.answers
        self._at_work: dict[int, Begun] = {}
        self._outbox: dict[int, bytes] = {}
        # Answers that came while the server evaluated.
        self._early: list[tuple[int, bytes]] = []

    def __call__(self, number: int, order: np.ndarray, server: ServerState) -> Arrivals:
        """The first answers, see :data:`hiso_jax.fed.run.Exchange`."""
        self._note_rounds()
        online, asking = self._quorum(), self._asking(number, {}, server)
        free = [int(client) for client in order if int(client) in online and int(client) not in self._at_work]
        for client in free[: self._most - len(self._at_work)]:
            self._begin(client, asking)
        ended: list[_Ended] = []
        while len(ended) < self._takes and self._at_work:
            ended += self._next(asking, self._takes - len(ended))
        # With too few clients online the rest of the row is clients that did not come.
        taken = {each.client for each in ended}
        others = [int(client) for client in order if int(client) not in taken and int(client) not in self._at_work]
        nobody = Begun(number, 0, 0.0)
        ended += [_Ended(client, nobody, ABSENT) for client in others[: self._takes - len(ended)]]
        visits = [np.array([getattr(each.visit, name) for each in ended], np.int32) for name in ("version", "place")]
        found = {each.client: each.content for each in ended if each.content is not None}
        cohort = np.array([each.client for each in ended], np.int32)
        return self._arrivals(cohort, np.array([each.status for each in ended], np.int8), found, visits)

    def _begin(self, client: int, asking: Asking) -> None:
        """Invite a client: its visit begins."""
        place = len(asking.places) % self._most
        asking.places[client] = place
        until = time.monotonic() + self._network.deadline
        self._at_work[client] = Begun(asking.number, place, until, asking.sample)
        self._outbox[client] = self._first(client, asking)

    def _next(self, asking: Asking, most: int) -> list[_Ended]:
        """The visits that end next, at least one unless none is at work, and at most ``most``."""
        # First, so that others who answer soon do not keep a silent client at work.
        ended = self._late(asking, most)
        if ended:
            return ended
        until = min(visit.until for visit in self._at_work.values())
        for client, message in self._coming(until):
            one = self._received(client, message, asking)
            if one is not None:
                ended.append(one)
            if len(ended) == most:
                return ended
        if not ended and not self._outbox:
            # Whoever is at work owes an answer that the transport does not know of.
            time.sleep(min(POLL, max(0.0, until - time.monotonic())))
        return ended

    def _coming(self, until: float) -> Iterator[tuple[int, bytes]]:
        """The messages that came during an evaluation, then those of the transport."""
        while self._early:
            yield self._early.pop(0)
        yield from self._transport.exchange(self._outbox, until, set(self._at_work))

    def _is_of_another(self, client: int, message: bytes, envelope: Envelope, asking: Asking) -> bool:
        """Whether a message is no answer to an evaluation; an answer of a visit at work is kept for the next round."""
        if envelope.kind is Kind.ANSWER:
            self._early.append((client, message))
        return envelope.kind is Kind.ANSWER or super()._is_of_another(client, message, envelope, asking)

    def _late(self, asking: Asking, most: int) -> list[_Ended]:
        """The visits, at most ``most``, whose deadline has passed."""
        now = time.monotonic()
        late = [client for client, visit in self._at_work.items() if visit.until <= now][:most]
        for client in late:
            self._outbox.pop(client, None)
        if late:
            self._notify(f"round {asking.number}: no answer in time of client {', '.join(map(str, late))}")
        return [_Ended(client, self._at_work.pop(client), LATE) for client in late]

    def _received(self, client: int, message: bytes, asking: Asking) -> _Ended | None:
        """The visit that a message ends; None if it goes on, or was counted already."""
        visit = self._at_work.get(client)
        if visit is None:
            return None
        try:
            envelope = opened(message)
            if envelope.kind is Kind.ANSWER and envelope.round != visit.version:
                # Of an earlier visit.
                return None
            if envelope.kind is not Kind.ANSWER:
                asking.places.setdefault(client, len(asking.places) % self._most)
            content = self._taken(client, envelope, asking, self._outbox)
        except BadMessage as error:
            self._notify(f"round {asking.number}: client {client} is left out: {error}")
            return _Ended(client, self._at_work.pop(client), DROPPED)
        if content is not None:
            return _Ended(client, self._at_work.pop(client), REPORTED, content)
        # It is asked again, to this round.
        place = asking.places.setdefault(client, len(asking.places) % self._most)
        self._at_work[client] = Begun(asking.number, place, visit.until, asking.sample)
        return None

    def _begun(self, client: int, asking: Asking) -> Begun:
        """The visit that a client's answer is of."""
        return self._at_work[client]
