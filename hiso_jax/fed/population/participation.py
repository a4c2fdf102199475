"""Who shows up: availability, dropout in mid-round, and stragglers behind a deadline."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8, Key

from hiso_jax.checks import ParameterError, between, first_line, is_plain, positive
from hiso_jax.fed.population.fleet import Fleet, Work

ABSENT, DROPPED, LATE, REPORTED = range(4)
"""What became of an invited client: never came, left in mid-round, answered too late, or counted."""
STATUS_NAMES = ("absent", "dropped", "late", "reported")


@runtime_checkable
class Availability(Protocol):
    """Which of the invited clients can take part; a pytree, so that it can enter a compiled program."""

    def __call__(
        self, key: Key[Array, ""], traits_key: Key[Array, ""], clients: Int[Array, "C"], round_number: Int[Array, ""]
    ) -> Bool[Array, "C"]:
        """``key`` is the round's, ``traits_key`` the run's."""


def _uniform(key: Key[Array, ""], clients: Int[Array, "C"]) -> Float[Array, "C"]:
    """A number in [0, 1) for each client, whatever its place in the cohort."""
    return jax.vmap(lambda client: jax.random.uniform(jax.random.fold_in(key, client)))(clients)


def _check_rate(option: str, value: Any) -> None:
    if is_plain(value):
        between(option, value, 0, 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bernoulli:
    """Every client is available in every round with probability ``rate``, independently."""

    rate: Any

    def __post_init__(self) -> None:
        """Raise a ValueError for a rate outside [0, 1]."""
        _check_rate("rate", self.rate)

    def __call__(self, key: Any, traits_key: Any, clients: Int[Array, "C"], round_number: Any) -> Bool[Array, "C"]:
        """See :class:`Availability`."""
        return _uniform(key, clients) < self.rate


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClientRates:
    """Client i is available in every round with probability ``rates[i]``, [N]."""

    rates: Any

    def __post_init__(self) -> None:
        """Raise a ValueError for a rate outside [0, 1]."""
        if isinstance(self.rates, list | tuple | np.ndarray):
            rates = np.asarray(self.rates, np.float32)
            if rates.ndim != 1 or not ((rates >= 0) & (rates <= 1)).all():
                raise ParameterError("rates", "must be one number between 0 and 1 for each client")
            object.__setattr__(self, "rates", rates)

    def __call__(self, key: Any, traits_key: Any, clients: Int[Array, "C"], round_number: Any) -> Bool[Array, "C"]:
        """See :class:`Availability`."""
        return _uniform(key, clients) < jnp.asarray(self.rates)[clients]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class UniformRates:
    """Each client has a rate of its own, drawn once, uniformly from [low, high]."""

    low: Any
    high: Any

    def __post_init__(self) -> None:
        """Raise a ValueError for a rate outside [0, 1], or a low one above the high one."""
        _check_rate("low", self.low)
        _check_rate("high", self.high)
        if is_plain(self.low) and is_plain(self.high) and self.low > self.high:
            raise ParameterError("low", f"must be at most high, {self.high}, got {self.low}")

    def __call__(self, key: Any, traits_key: Any, clients: Int[Array, "C"], round_number: Any) -> Bool[Array, "C"]:
        """See :class:`Availability`."""
        own = self.low + (self.high - self.low) * _uniform(traits_key, clients)
        return _uniform(key, clients) < own


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Diurnal:
    """Availability with the time of day: rate · (1 + amplitude · sin 2π(round / period + φ)), φ the client's own.

    Attributes:
      rate: the mean probability.
      amplitude: of the daily wave, in [0, 1]; probabilities above 1 count as 1.
      period: rounds in a day.
    """

    rate: Any
    amplitude: Any = 1.0
    period: Any = 100.0

    def __post_init__(self) -> None:
        """Raise a ValueError for a number out of range."""
        _check_rate("rate", self.rate)
        _check_rate("amplitude", self.amplitude)
        if is_plain(self.period):
            positive("period", self.period)

    def __call__(self, key: Any, traits_key: Any, clients: Int[Array, "C"], round_number: Any) -> Bool[Array, "C"]:
        """See :class:`Availability`."""
        turns = round_number / self.period + _uniform(traits_key, clients)
        own = self.rate * (1 + self.amplitude * jnp.sin(2 * jnp.pi * turns))
        return _uniform(key, clients) < own


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trace:
    """Availability as it was recorded: client i in round r is ``table[r mod T, i mod M]``, bool [T, M]."""

    table: Any

    def __post_init__(self) -> None:
        """Raise a ValueError for a table that is no rectangle of 0s and 1s."""
        if isinstance(self.table, list | tuple | np.ndarray):
            table = np.asarray(self.table)
            if table.ndim != 2 or not table.size or table.dtype.kind not in "biuf" or not np.isin(table, (0, 1)).all():
                raise ParameterError("table", "must be a rectangle of 0s and 1s only, rounds × clients")
            object.__setattr__(self, "table", table.astype(np.bool_))

    def __call__(self, key: Any, traits_key: Any, clients: Int[Array, "C"], round_number: Any) -> Bool[Array, "C"]:
        """See :class:`Availability`."""
        table = jnp.asarray(self.table)
        return table[round_number % table.shape[0], clients % table.shape[1]]


def load_trace(path: Path | str) -> Trace:
    """Read a trace: ``.npy``, a [rounds, clients] array, or ``.csv``, a line of 0s and 1s, comma-separated, a round.

    Raises:
      ValueError: there is no such file, or it is not a rectangle of 0s and 1s.
    """
    try:
        binary = Path(path).suffix == ".npy"
        with warnings.catch_warnings(action="ignore"):  # of an empty file, which is refused below
            table = np.load(path, allow_pickle=False) if binary else np.loadtxt(path, delimiter=",", ndmin=2)
    except (OSError, EOFError, ValueError) as error:
        raise ParameterError(
            "path", f"must name a .npy or .csv file of 0s and 1s, rounds × clients: {first_line(error)}"
        ) from error
    try:
        return Trace(np.asarray(table))
    except ValueError as error:
        raise ParameterError(
            "path", f"must name a table of 0s and 1s only, rounds × clients; {path} holds something else"
        ) from error


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Participation:
    """What becomes of the clients that the server invites.

    Attributes:
      availability: which of them come; None means all.
      dropout: the probability that one leaves in mid-round: it has downloaded, and sends nothing. None means never.
      fleet: how fast they are; None means that time is not simulated.
      deadline: seconds after which the server no longer waits; later scalars do not count. None means never.
    """

    availability: Any = None
    dropout: Any = None
    fleet: Fleet | None = None
    deadline: Any = None

    def __post_init__(self) -> None:
        """Check what can be checked.

        Raises:
          ValueError: a dropout outside [0, 1], a deadline that is not positive, or one without a fleet.
        """
        _check_rate("dropout", self.dropout)
        if self.deadline is not None:
            if self.fleet is None:
                raise ParameterError("deadline", "needs a fleet: without the clients' speeds nobody is late")
            if is_plain(self.deadline):
                positive("deadline", self.deadline)

    def check(self, clients: int) -> None:
        """Refuse rules for another population than one of ``clients`` clients.

        Raises:
          ValueError: rates that are not one for each of them.
        """
        if isinstance(self.availability, ClientRates) and len(self.availability.rates) != clients:
            raise ParameterError(
                "rates", f"must be one for each of {clients} clients, got {len(self.availability.rates)}"
            )


class Attendance(NamedTuple):
    """What became of a cohort.

    Attributes:
      status: ABSENT, DROPPED, LATE or REPORTED, [C].
      seconds: how long the round took, simulated.
    """

    status: Int8[Array, "C"]
    seconds: Float[Array, ""]


def attend(
    participation: Participation,
    key: Key[Array, ""],
    traits_key: Key[Array, ""],
    clients: Int[Array, "C"],
    round_number: Int[Array, ""],
    work: Work,
) -> Attendance:
    """Who of the cohort reports, and how long the server waits.

    It waits for the slowest client that reports; until the deadline, if there is one and a client that came does
    not report by then. Without a deadline a client that drops out is noticed at once.

    Args:
      participation: the rules.
      key: the presence key of the round.
      traits_key: of the run.
      clients: the cohort.
      round_number: r.
      work: what each client has to do.
    """
    fold_in = jax.random.fold_in
    available, dropped = jnp.ones(clients.shape, bool), jnp.zeros(clients.shape, bool)
    late, each = dropped, jnp.zeros(clients.shape, jnp.float32)
    if participation.availability is not None:
        available = participation.availability(fold_in(key, 0), fold_in(traits_key, 0), clients, round_number)
    if participation.dropout is not None:
        dropped = _uniform(fold_in(key, 1), clients) < participation.dropout
    if participation.fleet is not None:
        each = participation.fleet.seconds(fold_in(traits_key, 1), clients, work)
        if participation.deadline is not None:
            late = each > participation.deadline
    status = jnp.select([~available, dropped, late], [ABSENT, DROPPED, LATE], REPORTED).astype(jnp.int8)
    seconds = jnp.where(status == REPORTED, each, 0).max()
    if participation.deadline is not None:
        missing = ((status == DROPPED) | (status == LATE)).any()
        seconds = jnp.where(missing, participation.deadline, seconds)
    return Attendance(status, seconds.astype(jnp.float32))
