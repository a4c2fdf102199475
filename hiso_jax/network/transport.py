"""Transports: how the server's messages reach clients, and theirs the server."""

from collections.abc import Collection, Iterator, Mapping
from typing import Protocol

from hiso_jax.network.client import Client


class Transport(Protocol):
    """A way to clients. It knows whose message it is: a client's number is the transport's word, not the message's."""

    def online(self) -> set[int]:
        """The numbers of the clients that can be reached now."""
        ...

    def exchange(
        self, outbox: dict[int, bytes], until: float, waiting: Collection[int] = ()
    ) -> Iterator[tuple[int, bytes]]:
        """Send messages, and yield the answers as they come.

        Args:
          outbox: client → message. Messages are taken out as they are sent; the caller may put in more while it
            iterates.
          until: the time, of ``time.monotonic``, at which it ends if somebody still owes an answer.
          waiting: clients that were sent messages in earlier exchanges and owe answers, too; without them it ends when
            those to whom it sent have answered.

        Yields:
          (client, answer), also answers that come late to an earlier exchange.
        """
        ...


class InProcess:
    """Clients in this process, one after the other: for tests and dry runs."""

    def __init__(self, clients: Mapping[int, Client]) -> None:
        """``clients`` by their numbers."""
        self._clients = clients

    def online(self) -> set[int]:
        """All of them."""
        return set(self._clients)

    def exchange(
        self, outbox: dict[int, bytes], until: float, waiting: Collection[int] = ()
    ) -> Iterator[tuple[int, bytes]]:
        """Answers at once; nobody is late."""
        while outbox:
            client = min(outbox)
            yield client, self._clients[client].answer(outbox.pop(client))
