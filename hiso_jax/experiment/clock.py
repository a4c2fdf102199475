"""The options of dropout and client speed, and the participation that they describe."""

from dataclasses import dataclass

from hiso_jax import fed
from hiso_jax.checks import between, finite, positive
from hiso_jax.fed.population import Availability

BYTES_PER_MEGABIT = 1e6 / 8


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Dropout, deadline, and the simulated clock.

    Attributes:
      dropout: probability that a client that came leaves in mid-round and sends nothing.
      deadline: simulated seconds after which a client's scalars no longer count; by default never.
      forward_seconds: simulated clock: median seconds of a client's forward pass on one batch.
      forward_spread: standard deviation of the logarithm of --forward-seconds over the clients.
      direction_seconds: simulated clock: median seconds in which a client makes one direction, to measure along it or
        to catch up on missed rounds; 0 counts no time.
      downlink_mbps: simulated clock: median megabits a second from server to client.
      uplink_mbps: simulated clock: median megabits a second from client to server.
      bandwidth_spread: standard deviation of the logarithm of each bandwidth over the clients.
    """

    dropout: float = 0.0
    deadline: float | None = None
    forward_seconds: float = 0.1
    forward_spread: float = 0.5
    direction_seconds: float = 0.0
    downlink_mbps: float = 20.0
    uplink_mbps: float = 5.0
    bandwidth_spread: float = 0.5

    def check_clock(self) -> None:
        """Check every range.

        Raises:
          ParameterError: an option is out of range; the error names the first.
        """
        between("dropout", self.dropout, 0, 1)
        for option in ("forward_seconds", "downlink_mbps", "uplink_mbps"):
            positive(option, getattr(self, option))
        if self.deadline is not None:
            positive("deadline", self.deadline)
        for option in ("forward_spread", "bandwidth_spread", "direction_seconds"):
            finite(option, getattr(self, option))

    def participation(self, availability: Availability | None) -> fed.Participation:
        """The participation: availability, dropout, client speeds and the deadline."""
        fleet = fed.Fleet(
            forward_seconds=fed.LogNormal(self.forward_seconds, self.forward_spread),
            downlink=fed.LogNormal(self.downlink_mbps * BYTES_PER_MEGABIT, self.bandwidth_spread),
            uplink=fed.LogNormal(self.uplink_mbps * BYTES_PER_MEGABIT, self.bandwidth_spread),
            direction_seconds=self.direction_seconds or None,
        )
        return fed.Participation(availability, self.dropout or None, fleet, self.deadline)
