"""What a client downloads to take part in a round, to the byte: the rounds that it missed, or a checkpoint.

    header   8 bytes: the first round that follows and how many, two uint32, little-endian; the number is
             0xFFFFFFFF if a checkpoint follows
    seed     8 bytes, once per client: the words of the seed key
    rounds   4·K·P bytes each: ĝ, float32; NaN where no client was valid and nothing was applied
    or a checkpoint: the bytes of parameters and optimizer state, leaf by leaf

These are the bytes that :mod:`hiso_jax.fed.run.traffic` counts for algorithms whose wire is float32, the default.
Of one that needs fewer bits they are counted, and no message is packed.
"""

import struct
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key, PyTree

from hiso_jax.fed.ledger.records import Updates
from hiso_jax.fed.ledger.replay import replay

HEADER = struct.Struct("<II")
HEADER_BYTES = HEADER.size
SEED_BYTES = 8
SCALAR_BYTES = 4
CHECKPOINT = 2**32 - 1


def catch_up_message(
    updates: Updates, synced_to: int | None, round_number: int, checkpoint: tuple[PyTree, Any]
) -> bytes:
    """What the server sends a client that it invites to a round.

    Args:
      updates: the run's rounds so far.
      synced_to: the round before which the client knows all; None for one that never came.
      round_number: r.
      checkpoint: the server's (parameters, optimizer state) before that round, sent if it is the smaller.

    Raises:
      ValueError: aggregates that are not float32, or a seed key of another size than 8 bytes.
    """
    seed = np.asarray(jax.random.key_data(updates.seed_key)).astype("<u4").tobytes()
    kind = getattr(updates.aggregate, "dtype", "several numbers a direction")
    if kind != np.float32 or len(seed) != SEED_BYTES:
        raise ValueError(
            f"a message has float32 scalars and a seed key of {SEED_BYTES} bytes; got {kind} and {len(seed)} bytes"
        )
    missed = updates.between(synced_to or 0, round_number)
    told = np.where(missed.applied[:, None, None], missed.aggregate, np.nan).astype("<f4").tobytes()
    count, body = len(missed.round), told
    if len(told) > sum(leaf.nbytes for leaf in jax.tree.leaves(checkpoint)):
        count, body = CHECKPOINT, b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(checkpoint))
    return HEADER.pack(synced_to or 0, count) + (seed if synced_to is None else b"") + body


def catch_up(
    message: bytes,
    params: PyTree,
    state: optax.OptState,
    tx: optax.GradientTransformation,
    *,
    shape: tuple[int, int],
    seed_key: Key[Array, ""] | None = None,
) -> tuple[PyTree, optax.OptState, Key[Array, ""]]:
    """A client's parameters and optimizer state after what it was sent: the same replay as everyone's.

    Args:
      message: of :func:`catch_up_message`.
      params: what it had.
      state: what it had.
      tx: the optimizer of the run.
      shape: (K, P).
      seed_key: of the run; None for a client that never came, which is sent it.

    Returns:
      (params, state, seed key) as the server has them.
    """
    first, count = HEADER.unpack_from(message)
    body = message[HEADER.size :]
    if seed_key is None:
        seed_key = jax.random.wrap_key_data(jnp.asarray(np.frombuffer(body, "<u4", 2)))
        body = body[SEED_BYTES:]
    if count == CHECKPOINT:
        leaves, structure = jax.tree.flatten((params, state))
        arrays, begin = [], 0
        for leaf in leaves:
            size = leaf.nbytes
            arrays.append(jnp.asarray(np.frombuffer(body[begin : begin + size], leaf.dtype).reshape(leaf.shape)))
            begin += size
        return *jax.tree.unflatten(structure, arrays), seed_key
    aggregate = np.frombuffer(body, "<f4").reshape(count, *shape)
    applied = ~np.isnan(aggregate).any((1, 2))
    updates = Updates(seed_key, first + np.arange(count, dtype=np.int32), aggregate, applied)
    return *replay(params, tx, updates, state=state), seed_key
