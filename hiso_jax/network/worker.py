"""The worker at a client's node: it answers messages that come through a socket of this machine."""

import socket
import struct
from collections.abc import Callable
from pathlib import Path

from hiso_jax.network.client import Client
from hiso_jax.network.envelope import opened

LENGTH = struct.Struct("<Q")
# A message above this size is not read: no run of this machine's memory sends one.
MOST = 2**36
LOOK = 0.5


def _received(connection: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = connection.recv(min(count, 1 << 20))
        if not part:
            raise ConnectionError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def work(
    client: Client, path: Path, notify: Callable[[str], None], is_over: Callable[[], bool] = lambda: False
) -> None:
    """Answer messages one after the other until ``is_over()``.

    Args:
      client: the client.
      path: the socket, which only this user may open.
      notify: receives a line for every message.
      is_over: asked twice a second.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(8)
        listener.settimeout(LOOK)
        while not is_over():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                try:
                    connection.settimeout(60.0)
                    (length,) = LENGTH.unpack(_received(connection, LENGTH.size))
                    if length > MOST:
                        continue
                    answer = client.answer(_received(connection, length))
                    connection.sendall(LENGTH.pack(len(answer)) + answer)
                except (ConnectionError, OSError):
                    continue
            envelope = opened(answer)
            reason = f": {envelope.content.decode(errors='replace')}" if envelope.kind.name == "REFUSED" else ""
            notify(
                f"round {envelope.round}: {length:,} bytes came, {envelope.kind.name.lower()} of {len(answer)}{reason}"
            )
