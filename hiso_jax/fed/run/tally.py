"""What is counted while a run goes: bytes, visits, reports, losses, simulated time."""

from typing import Any

import numpy as np
from jaxtyping import Array, Int, Key

from hiso_jax.fed.ledger import Records
from hiso_jax.fed.population import REPORTED, STATUS_NAMES
from hiso_jax.fed.run.dispatch import RoundLog
from hiso_jax.fed.run.traffic import Costs, Traffic, stood_at


class Tally:
    """Running totals of a run.

    Attributes:
      traffic: bytes and visits.
      losses: the mean cohort losses of the rounds since the last evaluation.
      seconds: simulated.
      invalid: reports with a non-finite scalar.
    """

    def __init__(self, costs: Costs) -> None:
        """Nothing yet; ``costs`` are those of a client's visit."""
        self.traffic = Traffic(costs)
        self.losses: list[float] = []
        self.seconds, self.invalid = 0.0, 0
        self._statuses = np.zeros(REPORTED + 1, np.int64)

    def add(self, seed_key: Key[Array, ""], rounds: Int[np.ndarray, "R"], log: RoundLog) -> Records:
        """Count some rounds, and return them with their bytes; ``log`` is on the host."""
        columns = log.attendance, log.synced_to, log.record.valid
        sent = self.traffic.add(rounds, *map(np.asarray, columns))
        self._count(log.attendance, log.record.valid, log.record.loss, log.seconds)
        return log.as_records(seed_key, rounds, *sent)

    def restore(self, records: Records, clients: int, evaluated: int) -> None:
        """Count the rounds of a run of ``clients`` clients that goes on, last evaluated after ``evaluated`` rounds."""
        stood, _ = stood_at(records.round, records.cohort, records.attendance, clients)
        self.traffic.add(records.round, records.attendance, stood, records.valid)
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
