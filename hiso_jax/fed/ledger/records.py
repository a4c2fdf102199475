"""The rounds of a run as columns. With the initial parameters and the optimizer, they suffice to rebuild the run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8, Key, PyTree, UInt64

from hiso_jax.checks import ParameterError
from hiso_jax.fed.codes import Coded, Relayed, is_coded, pack, packed_size, unpack


class RoundRecord(NamedTuple):
    """The record of a round; with the round key it suffices for a replay.

    Attributes:
      scalars: each client's message, [C, K, P], a dict of such arrays, or :class:`~hiso_jax.fed.codes.Coded` values;
        None if messages are as large as the model and are not kept.
      valid: which clients reported and sent only finite values, [C].
      aggregate: the broadcast and applied aggregate, ĝ [K, G·P], a dict of such arrays, or Coded or
        :class:`~hiso_jax.fed.codes.Relayed` values; None where ``scalars`` is None.
      loss: the mean loss of the valid clients at the round's start, NaN if no client is valid.
      clipped: the number of valid clients whose messages were clipped; None for a method that does not clip.
      applied: whether the aggregate was applied; None if it is applied exactly when a client is valid.
    """

    scalars: PyTree[Float[Array, "C K P"]] | None
    valid: Bool[Array, "C"]
    aggregate: PyTree[Float[Array, "K P"]] | None
    loss: Float[Array, ""]
    clipped: Int[Array, ""] | None = None
    applied: Bool[Array, ""] | None = None


class Records(NamedTuple):
    """The rounds of a run, in order.

    Attributes:
      seed_key: the run's seed key.
      round: round numbers, [R].
      cohort: the ids of the clients invited to each round, [R, C].
      attendance: ABSENT, DROPPED, LATE or REPORTED for each of these clients, int8 [R, C].
      scalars: the messages, [R, C, K, P] or as in :class:`RoundRecord`; None for a method whose messages are not kept.
      valid: which clients reported finite values, [R, C].
      aggregate: the broadcast aggregates, [R, K, G·P] or as in :class:`RoundRecord`; None where ``scalars`` is None.
      loss: the mean loss of the valid clients at the round's start, [R].
      seconds: simulated seconds that the round took the clients, [R].
      bytes_up, bytes_down: bytes of all clients together, [R].
      clipped: the number of valid clients whose messages were clipped, [R]; None for a method that does not clip.
      applied: whether the aggregate was applied, [R]; None if it is applied exactly when a client is valid.
      version: the round in which each client's visit began, [R, C], in an asynchronous run; None if it is the row's.
      place: the place of each client among those that this round invited, [R, C]; None if it is that in the row.
    """

    seed_key: Key[Array, ""]
    round: Int[np.ndarray, "R"]
    cohort: Int[np.ndarray, "R C"]
    attendance: Int8[np.ndarray, "R C"]
    scalars: PyTree[Float[np.ndarray, "R C K P"]] | None
    valid: Bool[np.ndarray, "R C"]
    aggregate: PyTree[Float[np.ndarray, "R K P"]] | None
    loss: Float[np.ndarray, "R"]
    seconds: Float[np.ndarray, "R"]
    bytes_up: UInt64[np.ndarray, "R"]
    bytes_down: UInt64[np.ndarray, "R"]
    clipped: Int[np.ndarray, "R"] | None = None
    applied: Bool[np.ndarray, "R"] | None = None
    version: Int[np.ndarray, "R C"] | None = None
    place: Int[np.ndarray, "R C"] | None = None

    @property
    def updates(self) -> "Updates":
        """The aggregates, which everyone receives, without the losses, which only some optimizers read.

        Raises:
          ValueError: the messages are not kept.
        """
        if self.aggregate is None:
            raise ValueError(
                "a run of a method without scalars cannot be rebuilt from its records: its messages are as large as "
                "the model and are not kept"
            )
        applied = self.valid.any(1) if self.applied is None else self.applied
        clients = self.cohort.shape[1]
        return Updates(
            self.seed_key, self.round, self.aggregate, np.asarray(applied), clients, None, self.version, self.place
        )

    @property
    def updates_with_losses(self) -> "Updates":
        """The aggregates and the losses; a replay reads nothing else.

        Raises:
          ValueError: the messages are not kept.
        """
        return self.updates._replace(loss=self.loss)


@dataclass(frozen=True)
class Evaluation:
    """One row of a run's history, taken after ``round`` rounds.

    Attributes:
      round: the number of rounds run so far.
      train_loss: the mean cohort loss of the rounds since the row before; NaN at the start.
      metrics: the task's metrics, means over its test split.
      bytes_up, bytes_down: total bytes of all clients so far.
      forward_passes: the clients' loss evaluations so far.
      seconds: time spent in rounds so far, without compilation and evaluation.
      simulated_seconds: the time the rounds would have taken the clients; None without a fleet.
    """

    round: int
    train_loss: float
    metrics: dict[str, float]
    bytes_up: int
    bytes_down: int
    forward_passes: int
    seconds: float
    simulated_seconds: float | None = None


class Updates(NamedTuple):
    """The part of a run's rounds that every party must know, and no more.

    Attributes:
      seed_key: the run's seed key.
      round: round numbers, [R].
      aggregate: the broadcast aggregates, ĝ [R, K, G·P] or as in :class:`RoundRecord`.
      applied: whether ĝ was applied, [R]: if a client was valid, and always for a private method.
      clients: the number of clients that a round invites, C.
      loss: the cohort's loss at the round's start, [R], for an optimizer that reads it; None if it is not known.
      version, place: as in :class:`Records`; the aggregate then has P columns for each of the C visits.
    """

    seed_key: Key[Array, ""]
    round: Int[np.ndarray, "R"]
    aggregate: PyTree[Float[np.ndarray, "R K P"]]
    applied: Bool[np.ndarray, "R"]
    clients: int = 1
    loss: Float[np.ndarray, "R"] | None = None
    version: Int[np.ndarray, "R C"] | None = None
    place: Int[np.ndarray, "R C"] | None = None

    def between(self, begin: int, end: int | None = None) -> "Updates":
        """The updates of the rounds ``begin`` ≤ r < ``end``.

        Raises:
          ValueError: some of these rounds were not recorded.
        """
        first = int(self.round[0]) if len(self.round) else 0
        last = first + len(self.round)
        end = last if end is None else end
        if not first <= begin <= end <= last:
            raise ParameterError(
                "rounds", f"must be within {first} to {last}, which were recorded; got {begin} to {end}"
            )
        rows = slice(begin - first, end - first)
        names = ("round", "aggregate", "applied", "loss", "version", "place")
        return self._replace(**jax.tree.map(lambda column: column[rows], {name: getattr(self, name) for name in names}))


def named(name: str, tree: PyTree) -> dict[str, Any]:
    """The arrays of a nested dict by name: ``name``, ``name.slope``; no array for None. Codes keep their bits."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_coded)
    found: dict[str, Any] = {}
    for path, leaf in leaves:
        own = ".".join([name, *(str(key.key) for key in path)])
        if not is_coded(leaf):
            found[own] = leaf
            continue
        found[f"{own}.codes"] = Codes(leaf.codes, leaf.bits)
        found |= {f"{own}.{part}": getattr(leaf, part) for part in ("step", "valid") if hasattr(leaf, part)}
    return found


def unnamed(name: str, arrays: Mapping[str, Any]) -> PyTree:
    """The tree that :func:`named` flattened, rebuilt from ``arrays``, which may hold other arrays, too."""
    if name in arrays:
        return arrays[name]
    codes = arrays.get(f"{name}.codes")
    if isinstance(codes, Codes):
        step, valid = arrays[f"{name}.step"], arrays.get(f"{name}.valid")
        return Coded(codes.array, step, codes.bits) if valid is None else Relayed(codes.array, step, valid, codes.bits)
    own = [key for key in arrays if key.startswith(f"{name}.")]
    parts = dict.fromkeys(key.removeprefix(f"{name}.").split(".")[0] for key in own)
    return {part: unnamed(f"{name}.{part}", arrays) for part in parts} or None


class Codes(NamedTuple):
    """Codes of few bits, which files store packed.

    Attributes:
      array: int8 [..., K, P], or its shape.
      bits: bits of a code, b.
    """

    array: Any
    bits: int


def columns_of(records: Records) -> dict[str, Any]:
    """The columns of some rounds, by their names in the ledger's file, in order."""
    columns: dict[str, Any] = {}
    for name in Records._fields[1:]:
        columns |= named(name, getattr(records, name))
    return columns


@dataclass(frozen=True)
class Layout:
    """The layout of a round in the ledger's file: its fields in order, little-endian and packed.

    Attributes:
      columns: the name, type and shape of each field; the type is NumPy's or, for codes in few bits, ``int2`` etc.
    """

    columns: tuple[tuple[str, str, tuple[int, ...]], ...]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of a row, in which codes of few bits are packed bytes."""
        return np.dtype([(name, *_stored(kind, shape)) for name, kind, shape in self.columns])


def _bits_of(kind: str) -> int | None:
    """The bits of a type of codes such as ``int2``; None for a NumPy type."""
    return int(kind.removeprefix("int")) if kind.startswith("int") else None


def _stored(kind: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    bits = _bits_of(kind)
    return (kind, shape) if bits is None else ("|u1", (*shape[:-2], packed_size(math.prod(shape[-2:]), bits)))


def layout(records: Records) -> Layout:
    """The layout of ``records``, which hold arrays or shapes, [R, ...]."""

    def column(x: Any) -> tuple[str, tuple[int, ...]]:
        if isinstance(x, Codes):
            return f"int{x.bits}", tuple(x.array.shape[1:])
        return np.dtype(x.dtype).newbyteorder("<").str, tuple(x.shape[1:])

    return Layout(tuple((name, *column(x)) for name, x in columns_of(records).items()))


def as_rows(records: Records) -> np.ndarray:
    """Some rounds as rows of the file, [R]."""
    rows = np.empty(len(records.round), layout(records).dtype)
    for name, column in columns_of(records).items():
        rows[name] = pack(column.array, column.bits) if isinstance(column, Codes) else column
    return rows


def as_records(seed_key: Key[Array, ""], rows: np.ndarray, layout: Layout) -> Records:
    """The columns of some rows of the file."""
    columns: dict[str, Any] = {}
    for name, kind, shape in layout.columns:
        column, bits = np.ascontiguousarray(rows[name]), _bits_of(kind)
        columns[name] = column if bits is None else Codes(unpack(column, bits, shape[-2:]), bits)
    return Records(seed_key, *(unnamed(name, columns) for name in Records._fields[1:]))
