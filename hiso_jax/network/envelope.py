"""The envelope of every message of a federation: who sends it, for which run and round, and a checksum over all bytes.

    magic     4 bytes, "HSO1"
    kind      uint8, see :class:`Kind`
    flags     uint8
    place     uint16: the client's place in the cohort of the round
    round     uint32
    client    uint32: the client's number in the population
    run       8 bytes of the digest of the run's description
    content   as the kind defines
    checksum  8 bytes: BLAKE2b of all bytes before it

All numbers are little-endian. The checksum finds accidents; forgers are found by the transport, which knows whose
message it is (TLS, keys of the nodes).
"""

import hashlib
import struct
from enum import IntEnum
from typing import NamedTuple

from hiso_jax.network.catch_up import BadMessage

HEAD = struct.Struct("<4sBBHII8s")
MAGIC, CHECKSUM_BYTES, RUN_BYTES = b"HSO1", 8, 8
ENVELOPE_BYTES = HEAD.size + CHECKSUM_BYTES
NO_RUN = b"\0" * RUN_BYTES
# Longest text of a refusal, in bytes.
SENTENCE = 500


class Kind(IntEnum):
    """The kinds of messages: the first three go down to a client, the others up to the server."""

    DESCRIBE = 1
    INVITE = 2
    EVALUATE = 3
    HELLO = 16
    ANSWER = 17
    STANDS = 18
    REFUSED = 19
    METRICS = 20


class Envelope(NamedTuple):
    """A message that was read.

    Attributes:
      kind: its kind.
      run: 8 bytes of the digest of the run's description.
      round: r.
      client: the client's number.
      place: its place in the cohort.
      content: the bytes inside.
      flags: bits that the kind defines.
    """

    kind: Kind
    run: bytes
    round: int
    client: int
    place: int
    content: bytes
    flags: int = 0


def sealed(envelope: Envelope) -> bytes:
    """The message as bytes."""
    head = HEAD.pack(
        MAGIC, envelope.kind, envelope.flags, envelope.place, envelope.round, envelope.client, envelope.run
    )
    return head + envelope.content + _checksum(head + envelope.content)


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=CHECKSUM_BYTES).digest()


def opened(message: bytes) -> Envelope:
    """The inverse of :func:`sealed`.

    Raises:
      BadMessage: it is no message, of another version, or altered.
    """
    if len(message) < ENVELOPE_BYTES:
        raise BadMessage(f"a message has at least {ENVELOPE_BYTES} bytes, got {len(message)}")
    magic, kind, flags, place, number, client, run = HEAD.unpack_from(message)
    if magic != MAGIC:
        raise BadMessage(f"a message of this version begins with {MAGIC.decode()}, got {magic!r}")
    if message[-CHECKSUM_BYTES:] != _checksum(message[:-CHECKSUM_BYTES]):
        raise BadMessage("the message was altered on its way: its checksum differs")
    try:
        known = Kind(kind)
    except ValueError:
        raise BadMessage(f"a message of kind {kind} is unknown in this version") from None
    return Envelope(known, run, number, client, place, bytes(message[HEAD.size : -CHECKSUM_BYTES]), flags)


def refusal(sentence: str, run: bytes, number: int, client: int) -> bytes:
    """A refusal with its reason in one sentence."""
    text = sentence.encode()[:SENTENCE].decode(errors="ignore")
    return sealed(Envelope(Kind.REFUSED, run, number, client, 0, text.encode()))
