"""What a server holds while it exchanges messages: whom it knows, whom it waits for, and what it asks."""

from collections.abc import Callable
from typing import Any, NamedTuple

from hiso_jax.network.envelope import Kind


class Known(NamedTuple):
    """What the server believes of a client; the client knows better.

    Attributes:
      examples: the number of its examples.
      seconds: seconds that a direction takes it.
      round, history: where it stands.
      is_other: whether its parameters differ by rounding, as on another processor.
    """

    examples: int
    seconds: float
    round: int
    history: bytes
    is_other: bool = False


class Begun(NamedTuple):
    """A visit of a client that the server waits for.

    Attributes:
      version: the round to which it was invited.
      place: its place among the clients of this round.
      until: the time, of ``time.monotonic``, at which the server no longer waits.
      sample: a sample of the parameters of this round, if the client's are compared with them.
    """

    version: int
    place: int
    until: float
    sample: Any = None


class Way(NamedTuple):
    """A way to catch a client up.

    Attributes:
      size: its bytes.
      computing: seconds that it takes the client to apply it.
      number: the number in the header of the message.
      make: makes the bytes.
    """

    size: int
    computing: float
    number: int
    make: Callable[[], bytes]


class Asking:
    """A round, or an evaluation after it, while its messages are exchanged.

    Attributes:
      number: r.
      places: the clients that are asked → their places in the cohort.
      server: the :class:`~hiso_jax.fed.update.ServerState` at the start of the round, for checkpoints; None before the
        first, when clients are only told of the run.
      kind: what clients are asked for: an answer (INVITE) or metrics (EVALUATE).
      mark: a digest of the parameters that clients compare theirs with; None compares nothing.
      sample: a sample of these parameters, for clients whose digest differs.
      tries: how often each client was asked again.
    """

    def __init__(
        self,
        number: int,
        places: dict[int, int],
        server: Any,
        kind: Kind = Kind.INVITE,
        mark: bytes | None = None,
        sample: Any = None,
    ) -> None:
        """See the class."""
        self.number, self.places, self.server, self.kind = number, places, server, kind
        self.mark, self.sample = mark, sample
        self.tries: dict[int, int] = {}
