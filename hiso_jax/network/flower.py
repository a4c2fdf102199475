"""Flower 1.42 as a transport, and the run of a study as its ServerApp. It needs the extra ``flower``."""

import logging
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hiso_jax.checks import ParameterError
from hiso_jax.network.study import key_files, read_study, run_study

logger = logging.getLogger("hiso_jax")
# Seconds between looks for replies. Flower's own ``send_and_receive`` looks every three.
POLL = 0.05
# Seconds that a node has to tell its number, and between looks for nodes.
NAMING, LOOK = 30.0, 1.0


class _Owed(NamedTuple):
    """A message that a client owes an answer to.

    Attributes:
      client: the client's number.
      node: the node that it was sent to.
      content: its bytes.
      until: the time, of ``time.monotonic``, at which Flower drops it.
      is_lost: whether the node has gone since.
    """

    client: int
    node: int
    content: bytes
    until: float
    is_lost: bool = False


class FlowerTransport:
    """Clients at Flower's SuperNodes. A client that goes away and comes back is sent again what it owes an answer to.

    Args:
      grid: the grid of a ServerApp.
      keys: public key of a node → the number of its client. Without keys a node is asked for its number and believed,
        which is for trials on machines that trust each other.
    """

    def __init__(self, grid: Any, keys: Mapping[bytes, int] | None = None) -> None:
        """See the class."""
        self._grid, self._keys = grid, keys
        # Node → client, of all nodes that told; client → its newest node, of those that are connected.
        self._clients: dict[int, int] = {}
        self._online: dict[int, int] = {}
        self._asked: dict[str, tuple[int, float]] = {}
        # Message → the answer that is owed to it; answers that nobody has read.
        self._owed: dict[str, _Owed] = {}
        self._came: list[tuple[int, bytes]] = []
        self._looked = 0.0

    def online(self) -> set[int]:
        """The numbers of the clients whose nodes are connected."""
        self._look()
        return set(self._online)

    def _look(self) -> bool:
        """See who is connected, at most once in a while; return whether it looked."""
        if time.monotonic() - self._looked <= LOOK:
            return False
        self._looked = time.monotonic()
        nodes = {node.node_id: bytes(node.public_key) for node in self._grid.get_nodes()}
        if self._keys is None:
            self._name([node for node in nodes if node not in self._clients])
        else:
            found = {node: self._keys.get(key) for node, key in nodes.items()}
            self._clients |= {node: number for node, number in found.items() if number is not None}
        self._online = {number: node for node, number in self._clients.items() if node in nodes}
        return True

    def _name(self, nodes: list[int]) -> None:
        """Ask nodes for their clients' numbers, and take the answers that have come."""
        from flwr.app import ConfigRecord, Message, RecordDict

        now = time.monotonic()
        asked = {node for node, until in self._asked.values() if until > now}
        new = [node for node in nodes if node not in asked]
        messages = [
            Message(RecordDict({"hiso": ConfigRecord({})}), dst_node_id=node, message_type="query", ttl=NAMING)
            for node in new
        ]
        for identifier, node in zip(self._grid.push_messages(messages), new, strict=True) if messages else ():
            self._asked[identifier] = node, now + NAMING
        if not self._asked:
            return
        for reply in self._grid.pull_messages(list(self._asked)):
            node, _ = self._asked.pop(reply.metadata.reply_to_message_id, (reply.metadata.src_node_id, 0.0))
            if reply.has_content():
                self._clients[node] = int(reply.content["hiso"]["client"])
        self._asked = {each: given for each, given in self._asked.items() if given[1] > now}

    def exchange(
        self, outbox: dict[int, bytes], until: float, waiting: Collection[int] = ()
    ) -> Iterator[tuple[int, bytes]]:
        """See :class:`hiso_jax.network.Transport`."""
        own: set[str] = set()
        while True:
            dead = max(until, time.monotonic() + 1.0) + NAMING
            own |= self._pushed([(number, outbox.pop(number), dead) for number in list(outbox)])
            while self._came:
                yield self._came.pop(0)
            if outbox:
                continue
            now = time.monotonic()
            self._owed = {each: owed for each, owed in self._owed.items() if owed.until > now}
            if self._look():
                own |= self._again(own, waiting)
            owing = [each for each, owed in self._owed.items() if each in own or owed.client in waiting]
            if not owing or now >= until:
                return
            for reply in self._grid.pull_messages(owing):
                owed = self._owed.pop(reply.metadata.reply_to_message_id, None)
                if owed is None or not reply.has_content():
                    logger.info("client %s: its node answers with an error", owed and owed.client)
                    continue
                # Kept until they are asked for: who iterates may stop before the last of them.
                self._came.append((owed.client, bytes(reply.content["hiso"]["bytes"])))
            if not self._came:
                time.sleep(POLL)

    def _pushed(self, outbox: list[tuple[int, bytes, float]]) -> set[str]:
        """Send messages to the clients' newest nodes, and return Flower's names of the messages.

        ``outbox`` has the client, the bytes, and the time at which Flower drops them.
        """
        from flwr.app import ConfigRecord, Message, RecordDict

        # A node that has just gone is sent a message, too: the client is sent it again when it is back.
        nodes = {number: node for node, number in self._clients.items()} | self._online
        sent = [each for each in outbox if each[0] in nodes]
        if not sent:
            return set()
        now = time.monotonic()
        messages = [
            Message(
                RecordDict({"hiso": ConfigRecord({"bytes": content})}),
                dst_node_id=nodes[number],
                message_type="train",
                ttl=dead - now,
            )
            for number, content, dead in sent
        ]
        pushed = list(self._grid.push_messages(messages))
        for each, (number, content, dead) in zip(pushed, sent, strict=True):
            self._owed[each] = _Owed(number, nodes[number], content, dead)
        return set(pushed)

    def _again(self, own: set[str], waiting: Collection[int]) -> set[str]:
        """Send again what clients owe that went away and are back, perhaps as another node."""
        there, again = set(self._online.values()), []
        for each, owed in list(self._owed.items()):
            if owed.node not in there:
                self._owed[each] = owed._replace(is_lost=True)
            is_awaited = each in own or owed.client in waiting
            if is_awaited and owed.client in self._online and (owed.is_lost or owed.node != self._online[owed.client]):
                del self._owed[each]
                again.append((owed.client, owed.content, owed.until))
        return self._pushed(again)


def keys_of(path: Path) -> dict[bytes, int]:
    """The public keys that a ``clients.toml`` names, as the grid tells them → the numbers of their clients.

    Raises:
      ParameterError: it cannot be read, or names no keys.
    """
    from cryptography.hazmat.primitives import serialization

    found = {}
    for file, number in key_files(path).items():
        try:
            key = serialization.load_ssh_public_key(file.read_bytes())
        except (OSError, ValueError) as error:
            raise ParameterError("keys", f"must name public keys of OpenSSH; {file}: {error}") from error
        encoding, kind = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        found[key.public_bytes(encoding, kind)] = number
    return found


def serve(grid: Any, config: Mapping[str, Any]) -> None:
    """Run a study as a ServerApp; ``config`` has the paths ``study``, ``out`` and ``resume``."""
    study = read_study(Path(str(config["study"])))
    keys = None if study.keys is None else keys_of(study.keys)
    resume = str(config.get("resume") or "")
    run_study(
        study, FlowerTransport(grid, keys), out=Path(resume or str(config["out"])), resume=bool(resume), say=print
    )
