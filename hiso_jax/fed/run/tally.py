"""What is counted while a run goes: bytes, visits, reports, losses, simulated time."""

from typing import Any

import numpy as np
from jaxtyping import Int

from hiso_jax.fed.ledger import Records, as_rows
from hiso_jax.fed.population import REPORTED, STATUS_NAMES
from hiso_jax.fed.run.dispatch import RoundLog
from hiso_jax.fed.run.traffic import Traffic, stood_at


class Tally:
    """Running totals of a run.

    Attributes:
      traffic: bytes and visits.
      losses: the mean cohort losses of the rounds since the last evaluation.
      seconds: simulated.
      invalid: reports with a non-finite scalar.
    """

    def __init__(self, scalars: int, checkpoint_bytes: int) -> None:
        """Nothing yet; ``scalars`` is K·P, ``checkpoint_bytes`` the size of parameters and optimizer state."""
        self.traffic = Traffic(scalars, checkpoint_bytes)
        self.losses: list[float] = []
        self.seconds, self.invalid = 0.0, 0
        self._statuses = np.zeros(REPORTED + 1, np.int64)

    def add(self, rounds: Int[np.ndarray, "R"], log: RoundLog) -> np.ndarray:
        """Count some rounds, and return them as the ledger holds them, [R]; ``log`` is on the host."""
        attendance, stood = np.asarray(log.attendance), np.asarray(log.synced_to)
        sent = self.traffic.add(rounds, attendance, stood)
        self._count(attendance, log.record.valid, log.record.loss, log.seconds)
        return as_rows(rounds, np.asarray(log.clients), attendance, log.record, np.asarray(log.seconds), *sent)

    def restore(self, records: Records, clients: int, evaluated: int) -> None:
        """Count the rounds of a run of ``clients`` clients that goes on, last evaluated after ``evaluated`` rounds."""
        stood, _ = stood_at(records.round, records.cohort, records.attendance, clients)
        self.traffic.add(records.round, records.attendance, stood)
        self._count(records.attendance, records.valid, records.loss, records.seconds)
        self.losses = self.losses[evaluated:]

    def _count(self, attendance: Any, valid: Any, loss: Any, seconds: Any) -> None:
        self._statuses += np.bincount(attendance.reshape(-1), minlength=len(self._statuses))
        self.invalid += int(np.count_nonzero((attendance == REPORTED) & ~valid))
        self.seconds += float(seconds.sum(dtype=np.float64))
        self.losses += loss.tolist()

    @property
    def attendance(self) -> dict[str, int]:
        """How many of the invited were absent, dropped out, were late and reported."""
        return dict(zip(STATUS_NAMES, self._statuses.tolist(), strict=True))
