"""A federation over a network: the same algorithm values, run between machines that exchange bytes.

``Server`` and ``Client`` are bytes → bytes, without an engine; a :class:`Transport` carries the bytes.
"""

from hiso_jax.network.catch_up import BadMessage
from hiso_jax.network.client import Client
from hiso_jax.network.parts import Parts, parts, parts_of
from hiso_jax.network.server import Server, check_server
from hiso_jax.network.settings import NetworkSettings, NobodyCame
from hiso_jax.network.transport import InProcess, Transport
from hiso_jax.network.worker import work

__all__ = [
    "BadMessage",
    "Client",
    "InProcess",
    "NetworkSettings",
    "NobodyCame",
    "Parts",
    "Server",
    "Transport",
    "check_server",
    "parts",
    "parts_of",
    "work",
]
