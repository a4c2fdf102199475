"""The history of a run: a digest of all rounds before a round, by which server and client know that they mean the same.

h_0 is eight zero bytes, and h_{r+1} = BLAKE2b(h_r, the bytes that the server broadcasts for round r).
"""

import hashlib

from hiso_jax.network.catch_up import BadMessage, Form

HISTORY_BYTES = 8
BEGIN = b"\0" * HISTORY_BYTES


def after(history: bytes, broadcast: bytes, count: int, form: Form) -> bytes:
    """The history after ``count`` rounds more, whose broadcasts are ``broadcast``.

    Raises:
      BadMessage: the bytes end before the last round.
    """
    place = 0
    for number in range(count):
        end = place + form.round_bytes(broadcast, place)
        if end > len(broadcast):
            raise BadMessage(f"the message ends within round {number} of {count}")
        history = hashlib.blake2b(history + broadcast[place:end], digest_size=HISTORY_BYTES).digest()
        place = end
    return history
