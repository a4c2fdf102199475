"""The rounds of a run as columns: with the initial parameters and the optimizer, all that rebuilds it."""

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
    """What a round leaves behind; with the round key it is all that a replay needs.

    Attributes:
      scalars: each client's message, [C, K, P] or a dict of such arrays, or of :class:`~hiso_jax.fed.codes.Coded`
        numbers; None if messages are as large as the model, and not kept.
      valid: which clients reported and sent finite numbers only, [C].
      aggregate: what everyone is told and what was applied, ĝ [K, G·P] or a dict of such arrays, Coded or
        :class:`~hiso_jax.fed.codes.Relayed` numbers; None as ``scalars``.
      loss: the mean loss of the valid clients at the round's start, NaN if there is none.
      clipped: how many of the valid clients' messages were shortened; None of a method that shortens none.
      applied: whether the aggregate was applied; None where that is whether a client was valid.
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
      cohort: the clients invited to each round, [R, C].
      attendance: what became of them, ABSENT, DROPPED, LATE or REPORTED, int8 [R, C].
      scalars: the messages, [R, C, K, P] or as in :class:`RoundRecord`; None of a method whose messages are not kept.
      valid: which clients reported finite numbers, [R, C].
      aggregate: what everyone is told, [R, K, G·P] or as in :class:`RoundRecord`; None as ``scalars``.
      loss: the mean loss of the valid clients at the round's start, [R].
      seconds: how long the round took the clients, simulated, [R].
      bytes_up, bytes_down: of all clients together, [R].
      clipped: how many valid clients' messages were shortened, [R]; None of a method that shortens none.
      applied: whether the aggregate was applied, [R]; None where that is whether a client was valid.
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

    @property
    def updates(self) -> "Updates":
        """Their aggregates, which everyone receives. Their losses, which only some optimizers read, are left out.

        Raises:
          ValueError: the messages are not kept.
        """
        if self.aggregate is None:
            raise ValueError(
                "a run of a method without scalars cannot be rebuilt from its records: its messages are as large as "
                "the model and are not kept"
            )
        applied = self.valid.any(1) if self.applied is None else self.applied
        return Updates(self.seed_key, self.round, self.aggregate, np.asarray(applied), self.cohort.shape[1])

    @property
    def updates_with_losses(self) -> "Updates":
        """The aggregates and the losses: a replay reads nothing else.

        Raises:
          ValueError: the messages are not kept.
        """
        return self.updates._replace(loss=self.loss)


@dataclass(frozen=True)
class Evaluation:
    """One row of a run's history, taken after ``round`` rounds.

    Attributes:
      round: how many rounds have been run.
      train_loss: the mean cohort loss of the rounds since the row before; NaN at the start.
      metrics: the task's metrics, means over its test split.
      bytes_up, bytes_down: totals over all clients so far.
      forward_passes: client-loss evaluations so far.
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
    """The rounds of a run as every party must know them, and no more.

    Attributes:
      seed_key: the run's seed key.
      round: round numbers, [R].
      aggregate: what everyone is told, ĝ [R, K, G·P] or as in :class:`RoundRecord`.
      applied: whether ĝ was applied, because there was a valid client or a private method's always is, [R].
      clients: how many a round invites, C.
      loss: of the cohort where the round began, [R], for an optimizer that reads it; None where it is not known.
    """

    seed_key: Key[Array, ""]
    round: Int[np.ndarray, "R"]
    aggregate: PyTree[Float[np.ndarray, "R K P"]]
    applied: Bool[np.ndarray, "R"]
    clients: int = 1
    loss: Float[np.ndarray, "R"] | None = None

    def between(self, begin: int, end: int | None = None) -> "Updates":
        """Those of the rounds ``begin`` ≤ r < ``end``.

        Raises:
          ValueError: they are not all there.
        """
        first = int(self.round[0]) if len(self.round) else 0
        last = first + len(self.round)
        end = last if end is None else end
        if not first <= begin <= end <= last:
            raise ParameterError(
                "rounds", f"must be within {first} to {last}, which were recorded; got {begin} to {end}"
            )
        rows = slice(begin - first, end - first)
        own = self.round, self.aggregate, self.applied, self.loss
        number, aggregate, applied, loss = jax.tree.map(lambda column: column[rows], own)
        return self._replace(round=number, aggregate=aggregate, applied=applied, loss=loss)


def named(name: str, tree: PyTree) -> dict[str, Any]:
    """The arrays of a nested dict by name: ``name``, ``name.slope``; none of None. Codes stay with their bits."""
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
    """What :func:`named` took apart, from among other arrays."""
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
    """Codes of few bits, which are packed where they are kept.

    Attributes:
      array: int8 [..., K, P], or its shape.
      bits: b.
    """

    array: Any
    bits: int


def columns_of(records: Records) -> dict[str, Any]:
    """The columns of some rounds by their names in the ledger's file, in order."""
    columns: dict[str, Any] = {}
    for name in Records._fields[1:]:
        columns |= named(name, getattr(records, name))
    return columns


@dataclass(frozen=True)
class Layout:
    """How a round stands in the ledger's file: its fields in order, little-endian and packed.

    Attributes:
      columns: name, type and shape of each; the type is NumPy's, or ``int2`` and the like of codes in few bits.
    """

    columns: tuple[tuple[str, str, tuple[int, ...]], ...]

    @property
    def dtype(self) -> np.dtype:
        """Of a row: codes of few bits are bytes."""
        return np.dtype([(name, *_stored(kind, shape)) for name, kind, shape in self.columns])


def _bits_of(kind: str) -> int | None:
    """Of a type like ``int2``, of codes in few bits; None of NumPy's."""
    return int(kind.removeprefix("int")) if kind.startswith("int") else None


def _stored(kind: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    bits = _bits_of(kind)
    return (kind, shape) if bits is None else ("|u1", (*shape[:-2], packed_size(math.prod(shape[-2:]), bits)))


def layout(records: Records) -> Layout:
    """The layout of ``records``, which hold arrays, or shapes, [R, ...]."""

    def column(x: Any) -> tuple[str, tuple[int, ...]]:
        if isinstance(x, Codes):
            return f"int{x.bits}", tuple(x.array.shape[1:])
        return np.dtype(x.dtype).newbyteorder("<").str, tuple(x.shape[1:])

    return Layout(tuple((name, *column(x)) for name, x in columns_of(records).items()))


def as_rows(records: Records) -> np.ndarray:
    """A block of rounds as the file holds them, [R]."""
    rows = np.empty(len(records.round), layout(records).dtype)
    for name, column in columns_of(records).items():
        rows[name] = pack(column.array, column.bits) if isinstance(column, Codes) else column
    return rows


def as_records(seed_key: Key[Array, ""], rows: np.ndarray, layout: Layout) -> Records:
    """Rows of the file as columns."""
    columns: dict[str, Any] = {}
    for name, kind, shape in layout.columns:
        column, bits = np.ascontiguousarray(rows[name]), _bits_of(kind)
        columns[name] = column if bits is None else Codes(unpack(column, bits, shape[-2:]), bits)
    return Records(seed_key, *(unnamed(name, columns) for name in Records._fields[1:]))
