"""The bytes of a run, exactly and by the paper's convention.

Down: an 8-byte header, 8 bytes for the seed once per client, and an aggregate for each round that the client missed
since it last came (a newcomer missed them all), at most a checkpoint. Up: an 8-byte header and a message. Of float32
scalars both are 4·K·P bytes.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int8, UInt64

from hiso_jax.fed.ledger import HEADER_BYTES, SEED_BYTES
from hiso_jax.fed.population import ABSENT, DROPPED

NEVER_CAME = -1


class Costs(NamedTuple):
    """What a client's visit costs.

    Attributes:
      up: bytes of a message.
      down: bytes of an aggregate, of one round.
      checkpoint: bytes of all that a client needs to know, whatever it missed.
      passes: evaluations of its loss.
    """

    up: int
    down: int
    checkpoint: int
    passes: int


def upload_bytes(costs: Costs) -> int:
    """What a client sends in a round, in bytes."""
    return HEADER_BYTES + costs.up


def download_bytes(round_number: Any, synced_to: Any, costs: Costs, xp: Any = np) -> Any:
    """What a client must be sent to take part in a round, in bytes, in the shape of ``synced_to``.

    Args:
      round_number: r.
      synced_to: the round at which it last came, before which it knows all; NEVER_CAME for a newcomer.
      costs: of a visit.
      xp: numpy, in which integers of 64 bits are exact, or jax.numpy, which has float32 for the clock.
    """
    exact = xp is np
    missed = (round_number - xp.maximum(synced_to, 0)).astype(np.int64 if exact else np.float32)
    # As floats on the device: a checkpoint of two gigabytes is beyond its integers.
    each, most = (costs.down, costs.checkpoint) if exact else (float(costs.down), float(costs.checkpoint))
    return HEADER_BYTES + SEED_BYTES * (synced_to == NEVER_CAME) + xp.minimum(missed * each, most)


def stood_at(
    rounds: Int[np.ndarray, "R"], cohorts: Int[np.ndarray, "R C"], attendance: Int8[np.ndarray, "R C"], clients: int
) -> tuple[Int[np.ndarray, "R C"], Int[np.ndarray, "N"]]:
    """Where each of the invited stood when it was invited, and where every client stands in the end.

    The rounds are all there were from the first.
    """
    synced_to = np.full(clients, NEVER_CAME, np.int32)
    stood = np.empty(cohorts.shape, np.int32)
    for place, number in enumerate(rounds):
        stood[place] = synced_to[cohorts[place]]
        synced_to[cohorts[place][attendance[place] != ABSENT]] = number
    return stood, synced_to


@dataclass
class Traffic:
    """Running totals over all clients.

    Attributes:
      costs: of a client's visit.
      bytes_up, bytes_down: in bytes. A client that drops out has downloaded; one that is late has also sent.
      rounds: rounds counted.
      participants: distinct clients that ever came.
      visits: how often a client came, over all rounds.
    """

    costs: Costs
    bytes_up: int = 0
    bytes_down: int = 0
    rounds: int = 0
    participants: int = 0
    visits: int = 0

    def add(
        self, rounds: Int[np.ndarray, "R"], attendance: Int8[np.ndarray, "R C"], synced_to: Int[np.ndarray, "R C"]
    ) -> tuple[UInt64[np.ndarray, "R"], UInt64[np.ndarray, "R"]]:
        """Count some rounds: what became of the invited, and where each stood when it was invited.

        Returns:
          The bytes that went up, and those that went down, in each of the rounds.
        """
        came, sent = attendance != ABSENT, (attendance != ABSENT) & (attendance != DROPPED)
        down = download_bytes(rounds[:, None], synced_to, self.costs)
        each_down = np.where(came, down, 0).sum(1).astype(np.uint64)
        each_up = upload_bytes(self.costs) * np.count_nonzero(sent, axis=1).astype(np.uint64)
        self.bytes_down += int(each_down.sum())
        self.bytes_up += int(each_up.sum())
        self.participants += int(np.count_nonzero(came & (synced_to == NEVER_CAME)))
        self.visits += int(np.count_nonzero(came))
        self.rounds += len(rounds)
        return each_up, each_down

    @property
    def forward_passes(self) -> int:
        """Evaluations of their losses by all clients that came."""
        return self.visits * self.costs.passes

    def summary(self) -> dict[str, float]:
        """Totals, means per distinct participant and the paper's figure (rounds × (message + aggregate)), in bytes."""
        distinct = max(self.participants, 1)
        return {
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "bytes_up_per_client": self.bytes_up / distinct,
            "bytes_down_per_client": self.bytes_down / distinct,
            "bytes_paper_convention": self.rounds * (self.costs.up + self.costs.down),
            "participants": self.participants,
        }
