"""The totals that are counted during a run: bytes, visits, reports, losses, simulated time."""

import math
from typing import Any

import numpy as np
from jaxtyping import Array, Int, Key

from hiso_jax.fed.codes import offsets_of, zeros_of
from hiso_jax.fed.ledger import Records
from hiso_jax.fed.population import REPORTED, STATUS_NAMES
from hiso_jax.fed.run.invitation import Probing, probing_in
from hiso_jax.fed.run.state import RoundLog
from hiso_jax.fed.run.traffic import Costs, Traffic, last_synced_rounds


class Counters:
    """Running totals of a run.

    Attributes:
      traffic: bytes and visits.
      losses: the mean cohort losses of the rounds since the last evaluation.
      seconds: simulated seconds.
      offset: the mean of a message's scalars in units of their standard deviation, averaged over all valid messages;
        None if a message has fewer than two scalars. Along random directions it is about 0. Forward differences add
        μ·tr(∇²f)/2 to every scalar, on which codes of few bits lose their range.
      clipped: the share of the valid messages that the server clipped; None for a method that clips none.
    """

    def __init__(self, costs: Costs, probing: Probing | None = None) -> None:
        """Begin at zero.

        Args:
          costs: the costs of a client's visit.
          probing: client ids → which of them cannot backpropagate; None is no client.
        """
        self.traffic, self._probing = Traffic(costs), probing
        self.losses: list[float] = []
        self.seconds = 0.0
        self._statuses = np.zeros(REPORTED + 1, np.int64)
        self._offsets: list[float] = []
        self._messages = 0
        self._valid = 0
        self._clipped: int | None = None
        self._staleness: list[int] | None = None
        self._zeros = [0, 0]

    def add(self, seed_key: Key[Array, ""], rounds: Int[np.ndarray, "R"], log: RoundLog) -> Records:
        """Count some rounds, and return their records with their bytes; ``log`` is on the host."""
        attendance, synced_to, valid = map(np.asarray, (log.attendance, log.synced_to, log.record.valid))
        version = None if log.version is None else np.asarray(log.version)
        limited = probing_in(self._probing, log.cohort)
        sent = self.traffic.add(rounds, attendance, synced_to, valid, limited, version)
        self._count(log.attendance, log.record.loss, log.seconds)
        self._note_offsets(log.record.scalars, log.record.valid)
        self._note_clipped(log.record.clipped, log.record.valid)
        self._note_staleness(rounds, version, valid)
        self._note_zeros(log.record.scalars, valid)
        return log.as_records(seed_key, rounds, *sent)

    def restore(self, records: Records, clients: int, evaluated: int) -> None:
        """Count the past rounds of a resumed run of ``clients`` clients, last evaluated after ``evaluated`` rounds."""
        begun = records.round if records.version is None else records.version
        last_synced, _ = last_synced_rounds(begun, records.cohort, records.attendance, clients)
        limited = probing_in(self._probing, records.cohort)
        self.traffic.add(records.round, records.attendance, last_synced, records.valid, limited, records.version)
        self._count(records.attendance, records.loss, records.seconds)
        self._note_offsets(records.scalars, records.valid)
        self._note_clipped(records.clipped, records.valid)
        self._note_staleness(records.round, records.version, records.valid)
        self._note_zeros(records.scalars, records.valid)
        self.losses = self.losses[evaluated:]

    def _count(self, attendance: Any, loss: Any, seconds: Any) -> None:
        self._statuses += np.bincount(attendance.reshape(-1), minlength=len(self._statuses))
        self.seconds += float(seconds.sum(dtype=np.float64))
        self.losses += loss.tolist()

    def _note_offsets(self, scalars: Any, valid: Any) -> None:
        for each in offsets_of(scalars, valid):
            # Kept round by round and summed exactly, so that a resumed run gives the same value.
            self._offsets.append(float(each.sum()))
            self._messages += len(each)

    def _note_clipped(self, clipped: Any, valid: Any) -> None:
        if clipped is not None:
            self._clipped = (self._clipped or 0) + int(np.sum(clipped))
            self._valid += int(np.sum(valid))

    def _note_staleness(self, rounds: Any, version: Any, valid: Any) -> None:
        if version is not None:
            self._staleness = self._staleness or [0, 0, 0]
            ages = (np.asarray(rounds)[:, None] - np.asarray(version))[np.asarray(valid)]
            before = self._staleness
            self._staleness = [before[0] + int(ages.sum()), before[1] + len(ages), max([before[2], *ages.tolist()])]

    def _note_zeros(self, scalars: Any, valid: Any) -> None:
        self._zeros = [a + b for a, b in zip(self._zeros, zeros_of(scalars, np.asarray(valid)), strict=True)]

    @property
    def of_messages(self) -> dict[str, Any]:
        """The totals of a result that are of its messages: attendance, offset, clipped, staleness and zeros."""
        return {
            "attendance": self.attendance,
            "offset": self.offset,
            "clipped": self.clipped,
            "staleness": self.staleness,
            "zeros": self.zeros,
        }

    @property
    def zeros(self) -> float | None:
        """The share of the valid scalars that are zero; None if there are no scalars."""
        zero, whole = self._zeros
        return zero / whole if whole else None

    @property
    def staleness(self) -> dict[str, float] | None:
        """The mean and the most updates between an invitation and its answer that counted; None if synchronous."""
        if self._staleness is None:
            return None
        total, answers, most = self._staleness
        return {"mean": total / max(answers, 1), "most": most}

    @property
    def clipped(self) -> float | None:
        """See the attributes."""
        return None if self._clipped is None else self._clipped / max(self._valid, 1)

    @property
    def offset(self) -> float | None:
        """See the attributes."""
        return math.fsum(self._offsets) / self._messages if self._messages else None

    @property
    def attendance(self) -> dict[str, int]:
        """How many invited clients were absent, dropped out, were late and reported."""
        return dict(zip(STATUS_NAMES, self._statuses.tolist(), strict=True))
