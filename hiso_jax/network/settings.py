"""Settings of the rounds over a network."""

from dataclasses import dataclass

from hiso_jax.checks import integer, positive


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Settings of the rounds over a network.

    Attributes:
      deadline: seconds that the clients of a round have to answer; ten times as long before the first round.
      quorum: clients that must be online before a round begins.
      patience: seconds that the server waits for a quorum before it ends the run, which can be resumed.
      check_every: rounds between checks of the clients' parameters; 0 checks none.
      bytes_a_second: the assumed speed of a client's link, by which the way to catch up is chosen.
    """

    deadline: float = 60.0
    quorum: int = 1
    patience: float = 3600.0
    check_every: int = 5
    bytes_a_second: float = 1e6

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
          ParameterError: a number is out of range.
        """
        for name in ("deadline", "patience", "bytes_a_second"):
            positive(name, getattr(self, name))
        integer("quorum", self.quorum, 1)
        integer("check_every", self.check_every, 0)


class NobodyCame(RuntimeError):
    """Too few clients were online for too long."""
