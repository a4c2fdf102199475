"""The rounds of a run as columns: with the initial parameters and the optimizer, all that rebuilds it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8, Key, PyTree, UInt64


class RoundRecord(NamedTuple):
    """What a round leaves behind; with the round key it is all that a replay needs.

    Attributes:
      scalars: each client's message, [C, K, P] or a dict of such arrays; None if messages are as large as the model,
        and not kept.
      valid: which clients reported and sent finite numbers only, [C].
      aggregate: what was applied, ĝ [K, P] or a dict of such arrays; None as ``scalars``.
      loss: the mean loss of the valid clients at the round's start, NaN if there is none.
    """

    scalars: PyTree[Float[Array, "C K P"]] | None
    valid: Bool[Array, "C"]
    aggregate: PyTree[Float[Array, "K P"]] | None
    loss: Float[Array, ""]


class Records(NamedTuple):
    """The rounds of a run, in order.

    Attributes:
      seed_key: the run's seed key.
      round: round numbers, [R].
      cohort: the clients invited to each round, [R, C].
      attendance: what became of them, ABSENT, DROPPED, LATE or REPORTED, int8 [R, C].
      scalars: the messages, [R, C, K, P] or a dict of such arrays; None of a method whose messages are not kept.
      valid: which clients reported finite numbers, [R, C].
      aggregate: what was applied, [R, K, P] or a dict of such arrays; None as ``scalars``.
      loss: the mean loss of the valid clients at the round's start, [R].
      seconds: how long the round took the clients, simulated, [R].
      bytes_up, bytes_down: of all clients together, [R].
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

    @property
    def updates(self) -> "Updates":
        """What a replay needs of them.

        Raises:
          ValueError: the messages are not kept.
        """
        if self.aggregate is None:
            raise ValueError(
                "a run of a method without scalars cannot be rebuilt from its records: its messages are as large as "
                "the model and are not kept"
            )
        return Updates(self.seed_key, self.round, self.aggregate, np.asarray(self.valid.any(1)))


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
      aggregate: ĝ, [R, K, P] or a dict of such arrays.
      applied: whether there was a valid client, and ĝ was applied, [R].
    """

    seed_key: Key[Array, ""]
    round: Int[np.ndarray, "R"]
    aggregate: PyTree[Float[np.ndarray, "R K P"]]
    applied: Bool[np.ndarray, "R"]

    def between(self, begin: int, end: int | None = None) -> "Updates":
        """Those of the rounds ``begin`` ≤ r < ``end``.

        Raises:
          ValueError: they are not all there.
        """
        first = int(self.round[0]) if len(self.round) else 0
        last = first + len(self.round)
        end = last if end is None else end
        if not first <= begin <= end <= last:
            raise ValueError(f"rounds must be within {first} to {last}, which were recorded; got {begin} to {end}")
        rows = slice(begin - first, end - first)
        aggregate = jax.tree.map(lambda column: column[rows], self.aggregate)
        return self._replace(round=self.round[rows], aggregate=aggregate, applied=self.applied[rows])


def named(name: str, tree: PyTree) -> dict[str, Any]:
    """The arrays of a nested dict by name: ``name``, ``name.slope``; none of None."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join([name, *(str(key.key) for key in path)]): leaf for path, leaf in leaves}


def unnamed(name: str, arrays: Mapping[str, Any]) -> PyTree:
    """What :func:`named` took apart, from among other arrays."""
    if name in arrays:
        return arrays[name]
    own = [key for key in arrays if key.startswith(f"{name}.")]
    parts = dict.fromkeys(key.removeprefix(f"{name}.").split(".")[0] for key in own)
    return {part: unnamed(f"{name}.{part}", arrays) for part in parts} or None


def columns_of(records: Records) -> dict[str, Any]:
    """The columns of some rounds by their names in the ledger's file, in order."""
    columns: dict[str, Any] = {}
    for name in Records._fields[1:]:
        columns |= named(name, getattr(records, name))
    return columns


def layout(records: Records) -> np.dtype:
    """One round in the ledger's file, little-endian and packed; ``records`` hold arrays, or shapes, [R, ...]."""
    columns = columns_of(records)
    return np.dtype([(name, np.dtype(x.dtype).newbyteorder("<"), x.shape[1:]) for name, x in columns.items()])


def as_rows(records: Records) -> np.ndarray:
    """A block of rounds as the file holds them, [R]."""
    rows = np.empty(len(records.round), layout(records))
    for name, column in columns_of(records).items():
        rows[name] = column
    return rows


def as_records(seed_key: Key[Array, ""], rows: np.ndarray) -> Records:
    """Rows of the file as columns."""
    columns = {name: np.ascontiguousarray(rows[name]) for name in rows.dtype.names or ()}
    return Records(seed_key, *(unnamed(name, columns) for name in Records._fields[1:]))
