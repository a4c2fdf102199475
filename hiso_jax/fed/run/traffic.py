"""The bytes of a run, exactly and by the paper's convention.

Down: an 8-byte header, 2 bytes for the client's group if the cohort has several groups of directions, 8 bytes for the
seed once per client, and the broadcast of each round that the client missed since it last came (a newcomer missed all
rounds). A checkpoint, or the sums of a pool of seeds, replaces larger broadcasts. Up: an 8-byte header and a message.
With float32 scalars, a message and the broadcast of a round are 4·K·P bytes each.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int8, UInt64

from hiso_jax.fed.ledger import sums_bytes
from hiso_jax.fed.population import ABSENT, DROPPED
from hiso_jax.fed.wire import BroadcastBytes

NEVER_CAME = -1
# Bytes of an invitation's or an answer's header, of the seed, and of a group's number.
HEADER_BYTES, SEED_BYTES, GROUP_BYTES = 8, 8, 2


class Costs(NamedTuple):
    """The costs of a client's visit.

    Attributes:
      up: bytes of a message.
      broadcast: bytes that the server broadcasts for a round.
      checkpoint: bytes of the entire state that a client needs, whatever it missed.
      passes: forward passes of the client.
      probe_passes: those of a client that cannot backpropagate, in a mixed cohort.
      draws: directions that a client makes for its own message; 0 for a method without directions.
      replay_draws: directions that a client makes to catch up on one round: those of all groups, if every group draws
        its own.
      grouped: whether an invitation names the client's group.
      pool_seeds: S of a method whose missed rounds may be sent as S sums; 0 for other methods.
    """

    up: int
    broadcast: BroadcastBytes
    checkpoint: int
    passes: int
    draws: int = 0
    replay_draws: int = 0
    grouped: bool = False
    pool_seeds: int = 0
    probe_passes: int = 0

    @property
    def by_sums(self) -> bool:
        """Whether a client that missed many rounds is sent sums instead of a checkpoint."""
        return bool(self.pool_seeds) and sums_bytes(self.pool_seeds) < self.checkpoint


def upload_bytes(costs: Costs) -> int:
    """The bytes that a client sends in a round."""
    return HEADER_BYTES + costs.up


def download_bytes(broadcast: Any, newcomer: Any, costs: Costs, xp: Any = np) -> Any:
    """The bytes that a client must be sent to take part in a round, in the shape of ``broadcast``.

    Args:
      broadcast: bytes of the broadcasts of the rounds that it missed.
      newcomer: whether the client has never come.
      costs: the costs of a visit.
      xp: numpy, with exact integers of 64 bits, or jax.numpy, with float32 for the clock.
    """
    most = _most(costs, xp)
    return HEADER_BYTES + GROUP_BYTES * costs.grouped + xp.where(newcomer, SEED_BYTES, 0) + xp.minimum(broadcast, most)


def _most(costs: Costs, xp: Any) -> float:
    """The bytes that can replace the broadcasts of any number of rounds."""
    most = sums_bytes(costs.pool_seeds) if costs.by_sums else costs.checkpoint
    # A float on the device, whose integers cannot hold the size of a checkpoint of two gigabytes.
    return most if xp is np else float(most)


def directions_made(broadcast: Any, missed: Any, costs: Costs, xp: Any = np) -> Any:
    """The directions that a client makes to take part in a round: for its own scalars, and to replay ``missed`` rounds.

    If the bytes ``broadcast`` for the missed rounds exceed those of a checkpoint or of the sums, the client replays no
    round. With a checkpoint it makes no other directions; with sums it makes the entire pool.
    """
    whole, replayed = costs.pool_seeds * costs.by_sums, costs.replay_draws * missed
    return costs.draws + xp.where(broadcast > _most(costs, xp), whole, replayed)


def last_synced_rounds(
    rounds: Int[np.ndarray, "R *C"], cohorts: Int[np.ndarray, "R C"], attendance: Int8[np.ndarray, "R C"], clients: int
) -> tuple[Int[np.ndarray, "R C"], Int[np.ndarray, "N"]]:
    """The round at which each invited client was last synced when it was invited, and that of every client at the end.

    ``rounds`` must hold all rounds from the first: their numbers, or in an asynchronous run the round in which each
    visit began, [R, C]. A client's visits end in the order in which they began.
    """
    synced_to = np.full(clients, NEVER_CAME, np.int32)
    last_synced = np.empty(cohorts.shape, np.int32)
    for place, number in enumerate(rounds):
        last_synced[place] = synced_to[cohorts[place]]
        there = attendance[place] != ABSENT
        synced_to[cohorts[place][there]] = np.broadcast_to(number, there.shape)[there]
    return last_synced, synced_to


@dataclass
class Traffic:
    """Running totals over all clients.

    Attributes:
      costs: the costs of a client's visit.
      bytes_up, bytes_down: bytes sent and received. A client that drops out has downloaded; a late one has also sent.
      rounds: rounds counted.
      participants: distinct clients that ever came.
      visits: visits of clients, over all rounds.
      probe_visits: visits of clients that cannot backpropagate, in a mixed cohort.
      draws: directions that clients made, to measure and to catch up.
      broadcast: bytes that the server broadcast for all rounds before each, [rounds + 1].
    """

    costs: Costs
    bytes_up: int = 0
    bytes_down: int = 0
    rounds: int = 0
    participants: int = 0
    visits: int = 0
    probe_visits: int = 0
    draws: int = 0
    broadcast: Int[np.ndarray, "R1"] = field(default_factory=lambda: np.zeros(1, np.int64))

    def add(
        self,
        rounds: Int[np.ndarray, "R"],
        attendance: Int8[np.ndarray, "R C"],
        synced_to: Int[np.ndarray, "R C"],
        valid: Bool[np.ndarray, "R C"],
        probing: Bool[np.ndarray, "R C"] | None = None,
        version: Int[np.ndarray, "R C"] | None = None,
    ) -> tuple[UInt64[np.ndarray, "R"], UInt64[np.ndarray, "R"]]:
        """Count the next rounds.

        Args:
          rounds: the round numbers.
          attendance: the status of each invited client.
          synced_to: the round at which each was last synced when it was invited.
          valid: whether each client's message counted.
          probing: whether each client cannot backpropagate; None is no client.
          version: the round in which each visit began; None is that of its row.

        Returns:
          The bytes that went up and the bytes that went down, in each round.
        """
        came, sent = attendance != ABSENT, (attendance != ABSENT) & (attendance != DROPPED)
        each_broadcast = self.costs.broadcast.fixed + self.costs.broadcast.each * np.count_nonzero(valid, axis=1)
        self.broadcast = np.concatenate([self.broadcast, self.broadcast[-1] + np.cumsum(each_broadcast)])
        since = np.maximum(synced_to, 0)
        begun = rounds[:, None] if version is None else version
        broadcast = self.broadcast[begun] - self.broadcast[since]
        down = download_bytes(broadcast, synced_to == NEVER_CAME, self.costs)
        made = directions_made(broadcast, begun - since, self.costs)
        self.draws += int(np.where(came, made, 0).sum())
        each_down = np.where(came, down, 0).sum(1).astype(np.uint64)
        each_up = upload_bytes(self.costs) * np.count_nonzero(sent, axis=1).astype(np.uint64)
        self.bytes_down += int(each_down.sum())
        self.bytes_up += int(each_up.sum())
        self.participants += int(np.count_nonzero(came & (synced_to == NEVER_CAME)))
        self.visits += int(np.count_nonzero(came))
        self.probe_visits += 0 if probing is None else int(np.count_nonzero(came & probing))
        self.rounds += len(rounds)
        return each_up, each_down

    @property
    def forward_passes(self) -> int:
        """The forward passes of all clients that came."""
        return (self.visits - self.probe_visits) * self.costs.passes + self.probe_visits * self.costs.probe_passes

    def summary(self) -> dict[str, float]:
        """Totals, means per distinct participant, and the paper's figure: rounds × (message + aggregate), in bytes."""
        distinct = max(self.participants, 1)
        return {
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "bytes_up_per_client": self.bytes_up / distinct,
            "bytes_down_per_client": self.bytes_down / distinct,
            "bytes_paper_convention": self.rounds * (self.costs.up + self.costs.broadcast.most),
            "participants": self.participants,
            "directions": self.draws,
        }
