"""What goes between a client and the server, to the byte.

Up, every round: 8 bytes, the round and the client's place in its cohort, two uint32, little-endian; and a message:
for every array of it float32 numbers; or, of few bits, the step, float32, and the K·P codes, packed.

Down, to take part in a round, the rounds that a client missed, their sums over a pool of seeds, or a checkpoint:

    header   8 bytes: the first round that follows and how many, two uint32, little-endian; the number is
             0xFFFFFFFF if a checkpoint follows, 0xFFFFFFFE if sums do
    group    2 bytes, if the cohort is dealt into groups of directions: the client's
    seed     8 bytes, once per client: the words of the seed key
    rounds   what everyone is told of each, one of
             - 4·K·G·P bytes: ĝ, float32; NaN where no client was valid and nothing was applied
             - ĝ in few bits: its step, float32, NaN where nothing was applied, and the codes, packed
             - the clients' codes: a mask of C bits, who was valid; and of each of these its weighted step, float32,
               and its codes, packed
    or sums  of how many rounds, uint32, and of every seed its sum, float32 (``sums.py``)
    or a checkpoint: the bytes of parameters and optimizer state, leaf by leaf

These are the bytes that :mod:`hiso_jax.fed.run.traffic` counts. Of messages whose numbers are trees, or that a channel
has brought to few bits by itself (signs), they are counted, and nothing is packed.
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
    """What everyone is told of a round looks like, as client and server know before the first.

    Attributes:
      steps, perturbations: K, and P; of an aggregate G·P.
      bits: 32 for floats.
      clients: C if the clients' codes are passed on, else 0.
    """

    steps: int
    perturbations: int
    bits: int = 32
    clients: int = 0

    @property
    def packed(self) -> int:
        """Bytes of the codes of one message or aggregate."""
        return packed_size(self.steps * self.perturbations, self.bits)


def form_of(aggregate: Any) -> Form:
    """The form of some rounds' aggregates.

    Raises:
      ValueError: they are not float32 scalars or their codes.
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
    """What the client at ``place`` sends, its row [K, P] of a round's messages: float32 scalars, or their codes.

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


def _told(updates: Updates) -> bytes:
    """All rounds of ``updates`` as they are sent."""
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
    """What the server sends a client that it invites to a round.

    Args:
      updates: the run's rounds so far.
      synced_to: the round before which the client knows all; None for one that never came.
      round_number: r.
      checkpoint: the server's (parameters, optimizer state) before that round, sent if it is the smaller.
      group: the client's; None if all measure along the same directions.
      algorithm: of the run; where its rounds are sums over a pool of seeds, these are sent if they are the smallest.

    Raises:
      ValueError: aggregates that are not float32 or codes, or a seed key of another size than 8 bytes.
    """
    seed = np.asarray(jax.random.key_data(updates.seed_key)).astype("<u4").tobytes()
    form_of(updates.aggregate)
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a message has a seed key of {SEED_BYTES} bytes; got {len(seed)}")
    first = synced_to or 0
    missed = updates.between(first, round_number)
    count, body = len(missed.round), _told(missed)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(checkpoint))
    pool = None if algorithm is None else algorithm.pool_of(checkpoint[1])
    if algorithm is not None and pool is not None and sums_bytes(pool.seeds) < min(whole, len(body)):
        count, body = SUMS, pack_sums(updates, first, round_number, algorithm, checkpoint[1])
    elif len(body) > whole:
        count, body = CHECKPOINT, b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(checkpoint))
    own = b"" if group is None else struct.pack("<H", group)
    return HEADER.pack(first, count) + own + (seed if synced_to is None else b"") + body


def _read(body: bytes, count: int, form: Form) -> tuple[Any, Any]:
    """The aggregates of ``count`` rounds, and whether they were applied."""
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
    """A client's parameters and optimizer state after what it was sent: the same replay as everyone's.

    Of sums they are the server's but for rounding, of all else to the bit.

    Args:
      message: of :func:`catch_up_message`.
      params: what it had.
      state: what it had.
      tx: the optimizer of the run, or its algorithm, which sums need.
      form: of what is told of a round.
      clients: how many a round invites, C.
      grouped: whether the message names the client's group.
      seed_key: of the run; None for a client that never came, which is sent it.

    Returns:
      (params, state, seed key) as the server has them.

    Raises:
      ValueError: the message has sums, and the algorithm no pool or another.
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
