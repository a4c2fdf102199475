"""The contents of messages between a client and the server: a client's scalars, and the rounds that it missed.

Upload: 8 bytes (the round and the client's place in its cohort, two uint32, little-endian), then the message: its
scalars as float32 or, in few bits, the step (float32) and the K·P codes, packed.

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

Every message is read as a stranger's: its length is compared with its header before anything is allocated, and a
number that no honest party sends is refused. Rounds are applied in blocks, so that the memory for reading is bounded.
"""

import math
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key, PyTree

from hiso_jax.fed.algorithm import Algorithm, as_algorithm
from hiso_jax.fed.codes import Coded, Relayed, pack, packed_size, unpack
from hiso_jax.fed.devices import from_key_data, is_key, key_data
from hiso_jax.fed.ledger import Updates, add_sums, pack_sums, replay, sums_bytes
from hiso_jax.fed.run import GROUP_BYTES, HEADER_BYTES, SEED_BYTES

HEADER = struct.Struct("<II")
CHECKPOINT, SUMS = 2**32 - 1, 2**32 - 2
# The round and the place in which a visit began, before the aggregate of an asynchronous round.
VISIT = np.dtype([("version", "<u4"), ("place", "<u2")])
# Rounds that are read and applied at a time.
BLOCK = 64


class BadMessage(ValueError):
    """A message that no honest party of this run sends; the text says in one sentence why."""


class Form(NamedTuple):
    """The form of a round's broadcast, which client and server know before the first round.

    Attributes:
      steps, perturbations: K, and P; G·P for an aggregate.
      bits: bits of a scalar; 32 for floats.
      clients: C if the server relays the clients' codes, else 0.
      visits: B if a round applies answers of visits that began in other rounds, else 0.
    """

    steps: int
    perturbations: int
    bits: int = 32
    clients: int = 0
    visits: int = 0

    @property
    def packed(self) -> int:
        """The bytes of the packed codes of one message or aggregate."""
        return packed_size(self.steps * self.perturbations, self.bits)

    @property
    def row(self) -> int:
        """The bytes of one message or aggregate."""
        return 4 * self.steps * self.perturbations if self.bits == 32 else 4 + self.packed

    def round_bytes(self, body: bytes, begin: int) -> int:
        """The bytes of the round whose broadcast begins at ``begin`` of ``body``, as far as they are there."""
        visits = VISIT.itemsize * self.visits
        if not self.clients:
            return visits + self.row
        mask = -(-self.clients // 8)
        first = begin + visits
        return visits + mask + int.from_bytes(body[first : first + mask], "big").bit_count() * self.row


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


def content_of(message: Any) -> bytes:
    """A client's scalars [K, P], or their codes, as bytes.

    Raises:
      ValueError: the scalars are not float32.
    """
    form_of(message)
    if isinstance(message, Coded):
        return _floats(message.step) + pack(np.asarray(message.codes), message.bits).tobytes()
    return _floats(message)


def read_content(body: bytes, form: Form) -> Any:
    """The inverse of :func:`content_of`; ``form`` is that of a message, with the P of one client.

    Numbers that are not finite are read as they are: the round leaves their sender out.

    Raises:
      BadMessage: the length is another.
    """
    if len(body) != form.row:
        raise BadMessage(f"a message of scalars has {form.row} bytes, got {len(body)}")
    shape = form.steps, form.perturbations
    if form.bits == 32:
        return np.frombuffer(body, "<f4").reshape(shape).astype(np.float32)
    codes = unpack(np.frombuffer(body, "u1", offset=4), form.bits, shape)
    return Coded(codes, np.float32(struct.unpack_from("<f", body)[0]), form.bits)


def upload_message(message: Any, round_number: int, place: int) -> bytes:
    """The upload of the client at ``place``: its row [K, P] of a round's messages, float32 scalars or their codes.

    Raises:
      ValueError: the scalars are not float32.
    """
    return HEADER.pack(round_number, place) + content_of(message)


def _floats(numbers: Any) -> bytes:
    return np.asarray(numbers).astype("<f4").tobytes()


def broadcast_bytes(updates: Updates) -> bytes:
    """The bytes that the server broadcasts for all rounds of ``updates``."""
    if updates.version is not None and updates.place is not None:
        rows = np.empty(updates.version.shape, VISIT)
        rows["version"], rows["place"] = updates.version, updates.place
        first, alone = int(updates.round[0]) if len(updates.round) else 0, updates._replace(version=None, place=None)
        each = [broadcast_bytes(alone.between(number, number + 1)) for number in range(first, first + len(rows))]
        return b"".join(row.tobytes() + own for row, own in zip(rows, each, strict=True))
    aggregate, applied = updates.aggregate, np.asarray(updates.applied)
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


def checkpoint_bytes(checkpoint: PyTree) -> bytes:
    """The bytes of parameters and optimizer state, leaf by leaf."""
    return b"".join(np.asarray(key_data(leaf)).tobytes() for leaf in jax.tree.leaves(checkpoint))


def read_checkpoint(body: bytes, like: PyTree) -> PyTree:
    """The inverse of :func:`checkpoint_bytes`; ``like`` has the shapes.

    Raises:
      BadMessage: the length is another, or a number is not finite.
    """
    leaves, structure = jax.tree.flatten(like)
    rows = [np.asarray(key_data(leaf)) for leaf in leaves]
    expected = sum(row.nbytes for row in rows)
    if len(body) != expected:
        raise BadMessage(f"a checkpoint of this run has {expected} bytes, got {len(body)}")
    arrays, begin = [], 0
    for leaf, row in zip(leaves, rows, strict=True):
        array = np.frombuffer(body, row.dtype, row.size, begin).reshape(row.shape)
        if np.issubdtype(row.dtype, np.inexact) and not np.isfinite(np.asarray(array, np.float64)).all():
            raise BadMessage("a checkpoint has finite numbers only")
        begin += row.nbytes
        arrays.append(from_key_data(array, leaf) if is_key(leaf) else jnp.asarray(array))
    return jax.tree.unflatten(structure, arrays)


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
    if synced_to is None and len(seed) != SEED_BYTES:
        raise ValueError(f"a message has a seed key of {SEED_BYTES} bytes; got {len(seed)}")
    first = synced_to or 0
    missed = updates.between(first, round_number)
    count, body = len(missed.round), broadcast_bytes(missed)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(checkpoint))
    pool = None if algorithm is None else algorithm.pool_of(checkpoint[1])
    if algorithm is not None and pool is not None and sums_bytes(pool.seeds) < min(whole, len(body)):
        count, body = SUMS, pack_sums(updates, first, round_number, algorithm, checkpoint[1])
    elif len(body) > whole:
        count, body = CHECKPOINT, checkpoint_bytes(checkpoint)
    own = b"" if group is None else struct.pack("<H", group)
    return HEADER.pack(first, count) + own + (seed if synced_to is None else b"") + body


def _without_visits(body: bytes, count: int, form: Form) -> tuple[bytes, np.ndarray]:
    """The rounds in ``body`` without their visits, and the visits [R, B].

    Raises:
      BadMessage: the bytes end within a round.
    """
    parts, visits, place, size = [], [], 0, VISIT.itemsize * form.visits
    for number in range(count):
        end = place + form.round_bytes(body, place)
        if end > len(body):
            raise BadMessage(f"the message ends within round {number} of {count}")
        visits.append(np.frombuffer(body, VISIT, form.visits, place))
        parts.append(body[place + size : end])
        place = end
    return b"".join([*parts, body[place:]]), np.array(visits, VISIT).reshape(count, form.visits)


def _blocks(body: bytes, count: int, form: Form) -> Iterator[tuple[int, Any, np.ndarray]]:
    """The rounds in ``body``, at most :data:`BLOCK` at a time: (how many, their aggregates, whether each was applied).

    Raises:
      BadMessage: the bytes are not those of ``count`` rounds, or a number is not finite where a round was applied.
    """
    shape = form.steps, form.perturbations
    if not form.clients:
        if len(body) != count * form.row:
            raise BadMessage(f"{count} rounds of this run have {count * form.row} bytes, got {len(body)}")
        for begin in range(0, count, BLOCK):
            size = min(BLOCK, count - begin)
            part = body[begin * form.row : (begin + size) * form.row]
            if form.bits == 32:
                numbers = np.frombuffer(part, "<f4").reshape(size, *shape).astype(np.float32)
                applied = np.asarray(~np.isnan(numbers).any((1, 2)))
                if np.isinf(numbers).any():
                    raise BadMessage("an aggregate has finite numbers only")
                yield size, np.where(applied[:, None, None], numbers, np.float32(0)), applied
            else:
                rows = np.frombuffer(part, np.dtype([("step", "<f4"), ("codes", "u1", form.packed)]), size)
                applied = ~np.isnan(rows["step"])
                steps = np.where(applied, rows["step"], 0).astype(np.float32)
                _check_steps(steps)
                yield size, Coded(unpack(rows["codes"], form.bits, shape), steps, form.bits), applied
        return
    mask, each = -(-form.clients // 8), np.dtype([("step", "<f4"), ("codes", "u1", form.packed)])
    place = 0
    for begin in range(0, count, BLOCK):
        size = min(BLOCK, count - begin)
        valid = np.zeros((size, form.clients), bool)
        steps, codes = np.zeros(valid.shape, np.float32), np.zeros((*valid.shape, *shape), np.int8)
        for row in range(size):
            if len(body) - place < mask:
                raise BadMessage(f"the message ends within round {begin + row} of {count}")
            valid[row] = np.unpackbits(np.frombuffer(body, "u1", mask, place), count=form.clients)
            place += mask
            present = int(valid[row].sum())
            if len(body) - place < present * each.itemsize:
                raise BadMessage(f"the message ends within round {begin + row} of {count}")
            own = np.frombuffer(body, each, present, place)
            steps[row, valid[row]], codes[row, valid[row]] = own["step"], unpack(own["codes"], form.bits, shape)
            place += own.nbytes
        _check_steps(steps)
        yield size, Relayed(codes, steps, valid, form.bits), np.asarray(valid.any(1))
    if place != len(body):
        raise BadMessage(f"{len(body) - place} bytes stand behind the last round of the message")


def _check_steps(steps: np.ndarray) -> None:
    if not (np.isfinite(steps) & (steps >= 0)).all():
        raise BadMessage("the step of a round's codes is finite and not negative")


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
      BadMessage: no honest server of this run sends the message, which changed nothing.
      ValueError: the message has sums, and the algorithm has no pool or another pool.
    """
    head = HEADER_BYTES + GROUP_BYTES * grouped + SEED_BYTES * (seed_key is None)
    if len(message) < head:
        raise BadMessage(f"an invitation has at least {head} bytes, got {len(message)}")
    first, count = HEADER.unpack_from(message)
    body = message[HEADER_BYTES + GROUP_BYTES * grouped :]
    if seed_key is None:
        seed_key = jax.random.wrap_key_data(jnp.asarray(np.frombuffer(body, "<u4", 2)))
        body = body[SEED_BYTES:]
    if count == CHECKPOINT:
        return *read_checkpoint(body, (params, state)), seed_key
    if count == SUMS:
        algorithm = as_algorithm(tx)
        pool = algorithm.pool_of(state)
        # Of another pool, ``add_sums`` says so.
        whole = pool is not None and len(body) == sums_bytes(pool.seeds)
        if whole and not np.isfinite(np.frombuffer(body, "<f4", offset=4)).all():
            raise BadMessage("the sums of a pool are finite")
        return *add_sums(body, params, state, algorithm, seed_key), seed_key
    if first + count >= 2**31 or count * min(form.row, math.ceil(form.clients / 8) or form.row) > len(body):
        raise BadMessage(f"{count} rounds from round {first} on are said to follow, and the message is too short")
    done, visits = first, None
    if form.visits:
        body, visits = _without_visits(body, count, form)
        if (visits["version"] > first + np.arange(count)[:, None]).any():
            raise BadMessage("a visit begins in a round that had come")
    # Read to its end before anything is applied.
    parts = list(_blocks(body, count, form)) if count <= BLOCK else None
    if parts is None:
        for _ in _blocks(body, count, form):
            pass
    for size, aggregate, applied in parts or _blocks(body, count, form):
        updates = Updates(seed_key, done + np.arange(size, dtype=np.int32), aggregate, applied, clients)
        if visits is not None:
            own = visits[done - first : done - first + size]
            began = {name: own[name].astype(np.int32) for name in ("version", "place")}
            updates = updates._replace(version=began["version"], place=began["place"])
        params, state = replay(params, tx, updates, state=state)
        done += size
    return params, state, seed_key
