"""The bytes of a run, exactly and by the paper's convention, counted on the host."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int

HEADER_BYTES = 8
SEED_BYTES = 8
SCALAR_BYTES = 4


@dataclass
class Traffic:
    """Counts what clients and server send, with the catch-up of clients that were absent.

    Down: an 8-byte header, 8 bytes for the seed once per client, and 4·K·P for each round that the client missed
    since it last took part (a newcomer missed them all), at most a checkpoint. Up: an 8-byte header and 4·K·P.

    Attributes:
      clients: N, the population.
      scalars: K·P, scalars per client and round.
      checkpoint_bytes: the size of parameters and optimizer state, in bytes.
      bytes_up, bytes_down: totals over all clients, in bytes.
    """

    clients: int
    scalars: int
    checkpoint_bytes: int
    bytes_up: int = 0
    bytes_down: int = 0
    rounds: int = 0
    _synced_to: Int[np.ndarray, "N"] = field(init=False, repr=False)
    _seen: Bool[np.ndarray, "N"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._synced_to = np.zeros(self.clients, np.int32)
        self._seen = np.zeros(self.clients, np.bool_)

    def add_round(self, round_number: int, participants: Int[np.ndarray, "C"]) -> None:
        """Count one round in which the distinct ``participants`` take part."""
        payload = SCALAR_BYTES * self.scalars
        missed = round_number - self._synced_to[participants].astype(np.int64)
        catch_up = np.minimum(missed * payload, self.checkpoint_bytes).sum()
        newcomers = np.count_nonzero(~self._seen[participants])
        self.bytes_down += int(HEADER_BYTES * len(participants) + SEED_BYTES * newcomers + catch_up)
        self.bytes_up += (HEADER_BYTES + payload) * len(participants)
        self._synced_to[participants] = round_number
        self._seen[participants] = True
        self.rounds += 1

    @property
    def participants(self) -> int:
        """How many distinct clients have taken part."""
        return int(np.count_nonzero(self._seen))

    def summary(self) -> dict[str, float]:
        """Totals, means per distinct participant and the paper's figure (rounds × 2·K·P·4), in bytes."""
        distinct = max(self.participants, 1)
        return {
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "bytes_up_per_client": self.bytes_up / distinct,
            "bytes_down_per_client": self.bytes_down / distinct,
            "bytes_paper_convention": self.rounds * 2 * SCALAR_BYTES * self.scalars,
        }
