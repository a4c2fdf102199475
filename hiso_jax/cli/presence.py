"""The options for who shows up and how fast they are, and what is built from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hiso_jax import fed
from hiso_jax.checks import ParameterError, positive
from hiso_jax.fed.population import Availability

BYTES_PER_MEGABIT = 1e6 / 8


@dataclass(frozen=True, kw_only=True)
class Presence:
    """Availability, dropout, deadline, and the simulated clock.

    Attributes:
      availability: which invited clients come: all; each with one probability (bernoulli); each with its own
        (per-client); by the time of day (diurnal); as recorded (trace).
      availability_rate: mean probability that a client comes; for bernoulli, per-client and diurnal.
      availability_spread: per-client rates are uniform within this distance of the mean, or what fits [0, 1].
      rounds_per_day: period of diurnal availability, a wave from twice the mean, at most 1, to as far below it; each
        client has its own time zone.
      trace: .npy or .csv file of 0s and 1s, a line a round, a column a client; both start again at their end.
      dropout: probability that a client that came leaves in mid-round and sends nothing.
      deadline: simulated seconds after which a client's scalars no longer count; by default never.
      forward_seconds: simulated clock: median seconds in which a client evaluates its loss on one batch.
      forward_spread: standard deviation of its logarithm over the clients.
      direction_seconds: simulated clock: median seconds in which a client makes one direction, to measure along and to
        catch up on the rounds that it missed; 0 does not count them.
      downlink_mbps: simulated clock: median megabits a second from server to client.
      uplink_mbps: simulated clock: median megabits a second from client to server.
      bandwidth_spread: standard deviation of their logarithms over the clients.
    """

    availability: Literal["always", "bernoulli", "per-client", "diurnal", "trace"] = "always"
    availability_rate: float = 0.8
    availability_spread: float = 0.2
    rounds_per_day: float = 100.0
    trace: Path | None = None
    dropout: float = 0.0
    deadline: float | None = None
    forward_seconds: float = 0.1
    forward_spread: float = 0.5
    direction_seconds: float = 0.0
    downlink_mbps: float = 20.0
    uplink_mbps: float = 5.0
    bandwidth_spread: float = 0.5

    def check_presence(self) -> None:
        """Check every range.

        Raises:
          ValueError: naming the first option out of range.
        """
        for option in ("availability_rate", "availability_spread", "dropout"):
            if not 0 <= getattr(self, option) <= 1:
                raise ParameterError(option, f"must be between 0 and 1, got {getattr(self, option)}")
        for option in ("rounds_per_day", "forward_seconds", "downlink_mbps", "uplink_mbps"):
            positive(option, getattr(self, option))
        if self.deadline is not None:
            positive("deadline", self.deadline)
        for option in ("forward_spread", "bandwidth_spread", "direction_seconds"):
            if not 0 <= getattr(self, option) < float("inf"):
                raise ParameterError(option, f"must be a finite number ≥ 0, got {getattr(self, option)}")
        if (self.availability == "trace") != (self.trace is not None):
            raise ParameterError(
                "trace", f"must be given with availability trace and only then; availability is {self.availability}"
            )

    def participation(self) -> fed.Participation:
        """The rules that the options describe.

        Raises:
          ValueError: the trace cannot be read.
        """
        # As wide as leaves the mean what it is said to be.
        rate = self.availability_rate
        spread = min(self.availability_spread, rate, 1 - rate)
        amplitude = min(1.0, 1 / rate - 1) if rate else 0.0
        availability: Availability | None = None
        if self.availability == "bernoulli":
            availability = fed.Bernoulli(rate)
        elif self.availability == "per-client":
            availability = fed.UniformRates(rate - spread, rate + spread)
        elif self.availability == "diurnal":
            availability = fed.Diurnal(rate, amplitude, self.rounds_per_day)
        elif self.trace is not None:
            availability = fed.load_trace(self.trace)
        fleet = fed.Fleet(
            forward_seconds=fed.LogNormal(self.forward_seconds, self.forward_spread),
            downlink=fed.LogNormal(self.downlink_mbps * BYTES_PER_MEGABIT, self.bandwidth_spread),
            uplink=fed.LogNormal(self.uplink_mbps * BYTES_PER_MEGABIT, self.bandwidth_spread),
            direction_seconds=self.direction_seconds or None,
        )
        return fed.Participation(availability, self.dropout or None, fleet, self.deadline)
