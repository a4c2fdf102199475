"""The client's part: it hands bytes to the worker beside its SuperNode, and the worker's bytes back.

Flower starts a process for every message, so this one imports neither JAX nor HiSo-JAX: the worker
(``hiso-jax join``) keeps its programs compiled.
"""

import socket
import struct

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
LENGTH = struct.Struct("<Q")


def _received(connection: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = connection.recv(min(count, 1 << 20))
        if not part:
            raise ConnectionError("the worker closed the connection")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def asked(path: str, message: bytes) -> bytes:
    """The worker's answer to a message."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        connection.sendall(LENGTH.pack(len(message)) + message)
        (length,) = LENGTH.unpack(_received(connection, LENGTH.size))
        return _received(connection, length)


@app.train()
def train(message: Message, context: Context) -> Message:
    """A message of the server, answered by the worker."""
    answer = asked(str(context.node_config["socket"]), message.content["hiso"]["bytes"])
    return Message(RecordDict({"hiso": ConfigRecord({"bytes": answer})}), reply_to=message)


@app.query()
def who(message: Message, context: Context) -> Message:
    """The number of the client at this node."""
    return Message(RecordDict({"hiso": ConfigRecord({"client": int(context.node_config["client"])})}), reply_to=message)
