"""The bytes of the messages between a client and the server.

Upload, every round: 8 bytes (the round and the client's place in its cohort, two uint32, little-endian), then the
message: its scalars as float32 or, in few bits, the step (float32) and the K·P codes, packed.

Download, before a client takes part in a round: the rounds that it missed, their sums over a pool of seeds, or a
checkpoint:

    header   8 bytes: the first round that follows and the number of rounds, two uint32, little-endian; the number is
             0xFFFFFFFF if a checkpoint follows, 0xFFFFFFFE if sums follow
    group    2 bytes, if the cohort is divided into groups of directions: the client's group
    seed     8 bytes, once per client: the words of the seed key
    rounds   the broadcast of each round, one of
             - 4·K·G·P bytes: ĝ, float32; NaN where no client was valid and nothing was applied
             - ĝ in few bits: its step, float32, NaN where nothing was applied, and the codes, packed
             - the clients' codes: a mask of C bits that marks the valid clients; and for each valid client its
               weighted step, float32, and its codes, packed
    or sums  the number of rounds in the sums, uint32, and the sum of each seed, float32 (``seed_sums.py``)
    or a checkpoint: the bytes of parameters and optimizer state, leaf by leaf

:mod:`hiso_jax.fed.run.traffic` counts these bytes. It also counts the bytes of messages that are trees, or that a
channel itself reduces to few bits (signs); this module does not pack such messages.
"""

import struct
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key, PyTree

from hiso_jax.fed.algorithm import Algorithm, as_algorithm
from hiso_jax.fed.codes import Coded, Relayed, pack, packed_size, unpack
from hiso_jax.fed.ledger.records import Updates
from hiso_jax.fed.ledger.replay import replay
from hiso_jax.fed.ledger.seed_sums import add_sums, pack_sums, sums_bytes

HEADER = struct.Struct("<II")
HEADER_BYTES = HEADER.size
SEED_BYTES = 8
GROUP_BYTES = 2
CHECKPOINT, SUMS = 2**32 - 1, 2**32 - 2


class Form(NamedTuple):
    """The form of a round's broadcast, which client and server know before the first round.

    Attributes:
      steps, perturbations: K, and P; G·P for an aggregate.
      bits: bits of a scalar; 32 for floats.
      clients: C if the server relays the clients' codes, else 0.
    """

    steps: int
    perturbations: int
    bits: int = 32
    clients: int = 0

    @property
    def packed(self) -> int:
        """The bytes of the packed codes of one message or aggregate."""
        return packed_size(self.steps * self.perturbations, self.bits)


def form_of(aggregate: Any) -> Form:
    """The form of some rounds' aggregates.

    Raises:
      ValueError: the aggregates are not float32 scalars or their codes.
    """
    if isinstance(aggregate, Relayed):
        clients, steps, perturbations = aggregate.codes.shape[-3:]
        form = Form(steps, perturbations, aggregate.bits, clients)
    elif isinstance(aggregate, Coded):
        steps, perturbations = aggregate.codes.shape[-2:]
        form = Form(steps, perturbations, aggregate.bits)
    elif hasattr(aggregate, "shape"):
        form = Form(*aggregate.shape[-2:])
    else:
        raise ValueError("a message has one number a direction; got several")
    kind = aggregate.step.dtype if isinstance(aggregate, Coded | Relayed) else aggregate.dtype
    if kind != np.float32:
        raise ValueError(f"a message has float32 scalars; got {kind}")
    return form


def upload_message(message: Any, round_number: int, place: int) -> bytes:
    """The upload of the client at ``place``: its row [K, P] of a round's messages, float32 scalars or their codes.

    Raises:
      ValueError: the scalars are not float32.
    """
    form_of(message)
    head = HEADER.pack(round_number, place)
    if isinstance(message, Coded):
        return head + _floats(message.step) + pack(np.asarray(message.codes), message.bits).tobytes()
    return head + _floats(message)


def _floats(numbers: Any) -> bytes:
    return np.asarray(numbers).astype("<f4").tobytes()


def _update_bytes(updates: Updates) -> bytes:
    """The bytes that the server broadcasts for all rounds of ``updates``."""
    aggregate, applied = updates.aggregate, updates.applied
    if isinstance(aggregate, Relayed):
        packed, steps = pack(np.asarray(aggregate.codes), aggregate.bits), np.asarray(aggregate.step)
        parts = []
        for row, valid in enumerate(np.asarray(aggregate.valid)):
            parts.append(np.packbits(valid).tobytes())
            parts += [_floats(steps[row, c]) + packed[row, c].tobytes() for c in np.flatnonzero(valid)]
        return b"".join(parts)
    if isinstance(aggregate, Coded):
        packed = pack(np.asarray(aggregate.codes), aggregate.bits)
        steps = np.where(applied, aggregate.step, np.nan)
        return b"".join(_floats(step) + codes.tobytes() for step, codes in zip(steps, packed, strict=True))
    return _floats(np.where(applied[:, None, None], aggregate, np.nan))


def catch_up_message(
    updates: Updates,
    synced_to: int | None,
    round_number: int,
    checkpoint: tuple[PyTree, Any],
    group: int | None = None,
    algorithm: Algorithm | None = None,
) -> bytes:
    """The message that the server sends to a client that it invites to a round.

    Args:
      updates: the run's rounds so far.
      synced_to: the client knows all rounds before this one; None for a client that never came.
      round_number: r.
      checkpoint: the server's (parameters, optimizer state) before that round, sent if it is smaller than the rounds.
      group: the client's group of directions; None if all clients measure along the same directions.
      algorithm: the run's algorithm; if its rounds are sums over a pool of seeds, the sums are sent if they are the
        smallest.

    Raises:
      ValueError: the aggregates are not float32 or codes, or the seed key does not have 8 bytes.
    """
    seed = np.asarray(jax.random.key_data(updates.seed_key)).astype("<u4").tobytes()
    form_of(updates.aggregate)
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a message has a seed key of {SEED_BYTES} bytes; got {len(seed)}")
    first = synced_to or 0
    missed = updates.between(first, round_number)
    count, body = len(missed.round), _update_bytes(missed)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(checkpoint))
    pool = None if algorithm is None else algorithm.pool_of(checkpoint[1])
    if algorithm is not None and pool is not None and sums_bytes(pool.seeds) < min(whole, len(body)):
        count, body = SUMS, pack_sums(updates, first, round_number, algorithm, checkpoint[1])
    elif len(body) > whole:
        count, body = CHECKPOINT, b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(checkpoint))
    own = b"" if group is None else struct.pack("<H", group)
    return HEADER.pack(first, count) + own + (seed if synced_to is None else b"") + body


def _read(body: bytes, count: int, form: Form) -> tuple[Any, Any]:
    """The aggregates of ``count`` rounds, and whether each was applied."""
    shape = form.steps, form.perturbations
    if not form.clients:
        if form.bits == 32:
            numbers = np.frombuffer(body, "<f4").reshape(count, *shape)
            return numbers, ~np.isnan(numbers).any((1, 2))
        rows = np.frombuffer(body, np.dtype([("step", "<f4"), ("codes", "u1", form.packed)]), count)
        applied = ~np.isnan(rows["step"])
        steps = np.where(applied, rows["step"], 0).astype(np.float32)
        return Coded(unpack(rows["codes"], form.bits, shape), steps, form.bits), applied
    valid = np.zeros((count, form.clients), bool)
    steps, codes = np.zeros(valid.shape, np.float32), np.zeros((*valid.shape, *shape), np.int8)
    each, mask, place = np.dtype([("step", "<f4"), ("codes", "u1", form.packed)]), -(-form.clients // 8), 0
    for row in range(count):
        valid[row] = np.unpackbits(np.frombuffer(body, "u1", mask, place), count=form.clients)
        own = np.frombuffer(body, each, int(valid[row].sum()), place + mask)
        steps[row, valid[row]], codes[row, valid[row]] = own["step"], unpack(own["codes"], form.bits, shape)
        place += mask + own.nbytes
    return Relayed(codes, steps, valid, form.bits), valid.any(1)


def catch_up(
    message: bytes,
    params: PyTree,
    state: optax.OptState,
    tx: Algorithm | optax.GradientTransformation,
    *,
    form: Form,
    clients: int = 1,
    grouped: bool = False,
    seed_key: Key[Array, ""] | None = None,
) -> tuple[PyTree, optax.OptState, Key[Array, ""]]:
    """A client's parameters and optimizer state after it applies a message, by the same replay as everywhere.

    After sums they equal the server's up to rounding; otherwise they equal the server's bit for bit.

    Args:
      message: the message, from :func:`catch_up_message`.
      params: the client's parameters before.
      state: the client's optimizer state before.
      tx: the optimizer of the run, or its algorithm, which sums need.
      form: the form of a round's broadcast.
      clients: the number of clients that a round invites, C.
      grouped: whether the message names the client's group of directions.
      seed_key: the run's seed key; None for a client that never came, whose message contains it.

    Returns:
      (params, state, seed key) as the server has them.

    Raises:
      ValueError: the message has sums, and the algorithm has no pool or another pool.
    """
    first, count = HEADER.unpack_from(message)
    body = message[HEADER.size + GROUP_BYTES * grouped :]
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
    if count == SUMS:
        return *add_sums(body, params, state, as_algorithm(tx), seed_key), seed_key
    aggregate, applied = _read(body, count, form)
    updates = Updates(seed_key, first + np.arange(count, dtype=np.int32), aggregate, applied, clients)
    return *replay(params, tx, updates, state=state), seed_key
