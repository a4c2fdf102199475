"""Flower 1.42 as a transport, and the run of a study as its ServerApp. It needs the extra ``flower``."""

import logging
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from hiso_jax.checks import ParameterError
from hiso_jax.network.study import key_files, read_study, run_study

logger = logging.getLogger("hiso_jax")
# Seconds between looks for replies. Flower's own ``send_and_receive`` looks every three.
POLL = 0.05
# Seconds that a node has to tell its number, and between looks for nodes.
NAMING, LOOK = 30.0, 1.0


class FlowerTransport:
    """Clients at Flower's SuperNodes.

    Args:
      grid: the grid of a ServerApp.
      keys: public key of a node → the number of its client. Without keys a node is asked for its number and believed,
        which is for trials on machines that trust each other.
    """

    def __init__(self, grid: Any, keys: Mapping[bytes, int] | None = None) -> None:
        """See the class."""
        self._grid, self._keys = grid, keys
        self._clients: dict[int, int] = {}
        self._asked: dict[str, tuple[int, float]] = {}
        self._online: set[int] = set()
        # Message → the client that owes an answer to it, and when it is dead; answers that nobody has read.
        self._owed: dict[str, tuple[int, float]] = {}
        self._came: list[tuple[int, bytes]] = []
        self._looked = 0.0

    def online(self) -> set[int]:
        """The numbers of the clients whose nodes are connected."""
        if time.monotonic() - self._looked > LOOK:
            self._looked = time.monotonic()
            nodes = {node.node_id: bytes(node.public_key) for node in self._grid.get_nodes()}
            if self._keys is None:
                self._name([node for node in nodes if node not in self._clients])
            else:
                found = {node: self._keys.get(key) for node, key in nodes.items()}
                self._clients |= {node: number for node, number in found.items() if number is not None}
            self._online = {self._clients[node] for node in nodes if node in self._clients}
        return set(self._online)

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
        from flwr.app import ConfigRecord, Message, RecordDict

        nodes = {number: node for node, number in self._clients.items()}
        own: set[str] = set()
        while True:
            sent = {number: outbox.pop(number) for number in list(outbox) if number in nodes}
            outbox.clear()
            if sent:
                ttl = max(until - time.monotonic(), 1.0) + NAMING
                messages = [
                    Message(
                        RecordDict({"hiso": ConfigRecord({"bytes": content})}),
                        dst_node_id=nodes[number],
                        message_type="train",
                        ttl=ttl,
                    )
                    for number, content in sent.items()
                ]
                pushed, dead = self._grid.push_messages(messages), time.monotonic() + ttl
                self._owed |= {each: (number, dead) for each, number in zip(pushed, sent, strict=True)}
                own |= set(pushed)
            while self._came:
                yield self._came.pop(0)
            if outbox:
                continue
            now = time.monotonic()
            self._owed = {each: given for each, given in self._owed.items() if given[1] > now}
            owing = [each for each, (number, _) in self._owed.items() if each in own or number in waiting]
            if not owing or now >= until:
                return
            for reply in self._grid.pull_messages(owing):
                number, _ = self._owed.pop(reply.metadata.reply_to_message_id, (None, 0.0))
                if number is None or not reply.has_content():
                    logger.info("client %s: its node answers with an error", number)
                    continue
                # Kept until they are asked for: who iterates may stop before the last of them.
                self._came.append((number, bytes(reply.content["hiso"]["bytes"])))
            if not self._came:
                time.sleep(POLL)


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
