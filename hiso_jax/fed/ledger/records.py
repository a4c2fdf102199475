"""The rounds of a run as columns: with the initial parameters and the optimizer, all that rebuilds it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8, Key, UInt64


class RoundRecord(NamedTuple):
    """What a round leaves behind; with the round key it is all that a replay needs.

    Attributes:
      scalars: each client's scalars, [C, K, P].
      valid: which clients reported and sent finite scalars only, [C].
      aggregate: ĝ, the aggregate that was applied, [K, P].
      loss: the mean loss of the valid clients at the round's start, NaN if there is none.
    """

    scalars: Float[Array, "C K P"]
    valid: Bool[Array, "C"]
    aggregate: Float[Array, "K P"]
    loss: Float[Array, ""]


class Records(NamedTuple):
    """The rounds of a run, in order.

    Attributes:
      seed_key: the run's seed key.
      round: round numbers, [R].
      cohort: the clients invited to each round, [R, C].
      attendance: what became of them, ABSENT, DROPPED, LATE or REPORTED, int8 [R, C].
      scalars: [R, C, K, P].
      valid: which clients reported finite scalars, [R, C].
      aggregate: what was applied, [R, K, P].
      loss: the mean loss of the valid clients at the round's start, [R].
      seconds: how long the round took the clients, simulated, [R].
      bytes_up, bytes_down: of all clients together, [R].
    """

    seed_key: Key[Array, ""]
    round: Int[np.ndarray, "R"]
    cohort: Int[np.ndarray, "R C"]
    attendance: Int8[np.ndarray, "R C"]
    scalars: Float[np.ndarray, "R C K P"]
    valid: Bool[np.ndarray, "R C"]
    aggregate: Float[np.ndarray, "R K P"]
    loss: Float[np.ndarray, "R"]
    seconds: Float[np.ndarray, "R"]
    bytes_up: UInt64[np.ndarray, "R"]
    bytes_down: UInt64[np.ndarray, "R"]

    @property
    def updates(self) -> "Updates":
        """What a replay needs of them."""
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
      aggregate: ĝ, [R, K, P].
      applied: whether there was a valid client, and ĝ was applied, [R].
    """

    seed_key: Key[Array, ""]
    round: Int[np.ndarray, "R"]
    aggregate: Float[np.ndarray, "R K P"]
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
        return self._replace(round=self.round[rows], aggregate=self.aggregate[rows], applied=self.applied[rows])


def layout(record: RoundRecord) -> np.dtype:
    """One round in the ledger's file, little-endian and packed; ``record`` holds arrays, or shapes, [R, ...]."""

    def like(field: Any) -> tuple[Any, tuple[int, ...]]:
        return np.dtype(field.dtype).newbyteorder("<"), field.shape[1:]

    cohort = record.valid.shape[1:]
    return np.dtype(
        [
            ("round", "<i4"),
            ("cohort", "<i4", cohort),
            ("attendance", "i1", cohort),
            ("scalars", *like(record.scalars)),
            ("valid", "?", cohort),
            ("aggregate", *like(record.aggregate)),
            ("loss", *like(record.loss)),
            ("seconds", "<f4"),
            ("bytes_up", "<u8"),
            ("bytes_down", "<u8"),
        ]
    )


def as_rows(
    rounds: Int[np.ndarray, "R"],
    cohort: Int[np.ndarray, "R C"],
    attendance: Int8[np.ndarray, "R C"],
    record: RoundRecord,
    seconds: Float[np.ndarray, "R"],
    bytes_up: UInt64[np.ndarray, "R"],
    bytes_down: UInt64[np.ndarray, "R"],
) -> np.ndarray:
    """A block of rounds as the file holds them, [R]; the fields of ``record`` have a leading axis R."""
    rows = np.empty(len(rounds), layout(record))
    given = {"round": rounds, "cohort": cohort, "attendance": attendance, **record._asdict()}
    given |= {"seconds": seconds, "bytes_up": bytes_up, "bytes_down": bytes_down}
    for name, column in given.items():
        rows[name] = column
    return rows


def as_records(seed_key: Key[Array, ""], rows: np.ndarray) -> Records:
    """Rows of the file as columns."""
    return Records(seed_key, *(np.ascontiguousarray(rows[name]) for name in Records._fields[1:]))
