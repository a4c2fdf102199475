"""Participation: availability of clients, dropout in mid-round, and a deadline for stragglers."""

import dataclasses
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8, Key

from hiso_jax.checks import ParameterError, between, first_line, is_plain, is_real, of_kind, positive
from hiso_jax.fed.population.fleet import Fleet, LogNormal, Work
from hiso_jax.fed.population.rules import check_rule
from hiso_jax.fed.population.selection import Select
from hiso_jax.zo import fold_in

ABSENT, DROPPED, LATE, REPORTED = range(4)
"""The attendance of an invited client: it never came, left in mid-round, reported too late, or counted."""
STATUS_NAMES = ("absent", "dropped", "late", "reported")


@runtime_checkable
class Availability(Protocol):
    """A rule that says which invited clients can take part; a pytree, so that it can enter a compiled program.

    A rule with an attribute ``reads_clock`` that is true is given, in place of the round, the simulated seconds from
    the begin of the run to the begin of the round, float32.
    """

    def __call__(
        self, key: Key[Array, ""], traits_key: Key[Array, ""], clients: Int[Array, "C"], round_number: Int[Array, ""]
    ) -> Bool[Array, "C"]:
        """Whether each of ``clients`` is available, [C]; ``key`` is the round's, ``traits_key`` the run's."""


def _uniform(key: Key[Array, ""], clients: Int[Array, "C"]) -> Float[Array, "C"]:
    """A uniform value in [0, 1) for each client, independent of its place in the cohort, [C]."""
    return jax.vmap(lambda client: jax.random.uniform(fold_in(key, client)))(clients)


def _check_rate(option: str, value: Any) -> None:
    if is_plain(value):
        between(option, value, 0, 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bernoulli:
    """Each client is available in each round with probability ``rate``, independently."""

    rate: Any

    def __post_init__(self) -> None:
        """Raise a ValueError if a rate is outside [0, 1]."""
        _check_rate("rate", self.rate)

    def __call__(self, key: Any, traits_key: Any, clients: Int[Array, "C"], round_number: Any) -> Bool[Array, "C"]:
        """See :class:`Availability`."""
        return _uniform(key, clients) < self.rate


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClientRates:
    """Client i is available in each round with probability ``rates[i]``, [N]."""

    rates: Any

    def __post_init__(self) -> None:
        """Raise a ValueError if a rate is outside [0, 1]."""
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
    """Each client has its own rate of availability, drawn once, uniformly from [low, high]."""

    low: Any
    high: Any

    def __post_init__(self) -> None:
        """Raise a ValueError if a rate is outside [0, 1] or ``low`` exceeds ``high``."""
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
    """Availability that follows the time of day: rate · (1 + amplitude · sin 2π(time / period + φ)), φ per client.

    Attributes:
      rate: mean probability.
      amplitude: amplitude of the daily wave, in [0, 1]; probabilities above 1 count as 1.
      period: rounds in a day, or seconds.
      in_seconds: whether the time is that of the simulated clock, and not the round. Methods whose rounds take
        different times then meet the same days.
    """

    rate: Any
    amplitude: Any = 1.0
    period: Any = 100.0
    in_seconds: bool = field(default=False, metadata={"static": True})

    @property
    def reads_clock(self) -> bool:
        """Whether the rule reads the simulated clock."""
        return self.in_seconds

    def __post_init__(self) -> None:
        """Raise a ValueError if an option is out of range."""
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
    """Recorded availability: that of client i in round r is ``table[r mod T, i mod M]``, bool [T, M]."""

    table: Any

    def __post_init__(self) -> None:
        """Raise a ValueError if the table is not a rectangle of 0s and 1s."""
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
    """Read a trace: ``.npy``, an array [rounds, clients], or ``.csv``, a line of comma-separated 0s and 1s per round.

    Raises:
      ValueError: the file does not exist, or is not a rectangle of 0s and 1s.
    """
    try:
        binary = Path(path).suffix == ".npy"
        with warnings.catch_warnings(action="ignore"):  # np.loadtxt warns of an empty file, which is refused below
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


SIGNATURE = "function(key, traits_key, clients [C], round_number) → bool [C]"


# The number of clients for which a function is checked.
TRIED = 3


def _as_rule(given: Any) -> Any:
    """An availability as a pytree; a plain function is wrapped.

    Raises:
      ParameterError: it is neither a rule nor a function of four arguments that returns a truth value for each client.
    """
    if is_plain(given) or isinstance(given, type):
        raise ParameterError("availability", f"must be a rule like fed.Bernoulli(0.8), or a {SIGNATURE}; got {given!r}")
    # A rule is a pytree. JAX puts its own objects, which cannot be called, in the place of one.
    if not callable(given) or not jax.tree_util.all_leaves([given]):
        return given
    key, clients = jax.random.key(0), jnp.arange(TRIED)
    check_rule(
        "availability", SIGNATURE, given, lambda rule: rule(key, key, clients, jnp.int32(0)), (TRIED,), jnp.bool_
    )
    return jax.tree_util.Partial(given)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["availability", "dropout", "fleet", "deadline"],
    meta_fields=["select"],
)
@dataclass(frozen=True)
class Participation:
    """The rules that decide which clients are invited, and the attendance of the invited clients.

    Attributes:
      availability: rule that says which invited clients come, or a function ``(key, traits_key, clients [C],
        round_number) → bool [C]``; None means all.
      dropout: probability that a client leaves in mid-round, after its download and before its upload; None means
        never.
      fleet: speeds of the clients; None means that time is not simulated.
      deadline: seconds after which the server no longer waits; later messages do not count. None means no deadline.
      select: rule that chooses the cohort, ``(key, round_number, state) → int [C]``, see :data:`Select`; None draws it
        uniformly.
    """

    availability: Any = None
    dropout: Any = None
    fleet: Fleet | None = None
    deadline: Any = None
    select: Select | None = None

    def __post_init__(self) -> None:
        """Check the options that are plain numbers.

        Raises:
          ValueError: ``dropout`` is outside [0, 1], ``deadline`` is not positive, or there is a deadline without a
            fleet.
        """
        object.__setattr__(self, "availability", _as_rule(self.availability))
        _check_rate("dropout", self.dropout)
        if self.deadline is not None:
            if self.fleet is None:
                raise ParameterError("deadline", "needs a fleet: without the clients' speeds nobody is late")
            if is_plain(self.deadline):
                positive("deadline", self.deadline)

    def _check_numbers(self) -> None:
        """Refuse values that are no numbers; not at the start, because JAX puts its own objects in their place."""
        if isinstance(self.availability, Bernoulli | UniformRates | Diurnal | ClientRates | Trace):
            _check_rule(self.availability)
        if self.fleet is not None:
            of_kind("fleet", self.fleet, Fleet, "a fed.Fleet")
            for name in ("forward_seconds", "downlink", "uplink", "memory"):
                value = getattr(self.fleet, name)
                if value is not None or name != "memory":
                    of_kind(name, value, LogNormal, "a fed.LogNormal of a median and a spread")
                    _check_rule(value)
        for name in ("dropout", "deadline"):
            value = getattr(self, name)
            if value is not None and not _is_number(value):
                raise ParameterError(name, f"must be a number or None, got {value!r}")

    def first_clock(self) -> Float[Array, ""] | None:
        """The simulated seconds before the first round, for an availability that reads the clock; else None."""
        # A function stands in a Partial.
        rule = getattr(self.availability, "func", self.availability)
        return jnp.float32(0) if getattr(rule, "reads_clock", False) else None

    def check(self, clients: int) -> None:
        """Refuse rules that do not fit a population of ``clients`` clients.

        Raises:
          ValueError: the availability has rates, but not one for each client; or it reads the clock, and there is none.
        """
        self._check_numbers()
        if self.fleet is None and self.first_clock() is not None:
            raise ParameterError("availability", "must not read the clock without a fleet, whose speeds make it run")
        if isinstance(self.availability, ClientRates) and len(self.availability.rates) != clients:
            raise ParameterError(
                "rates", f"must be one for each of {clients} clients, got {len(self.availability.rates)}"
            )


def _check_rule(rule: Any) -> None:
    """Refuse a rule whose fields are not the numbers, or the array, that it needs."""
    for each in dataclasses.fields(rule):
        if each.metadata.get("static"):
            continue
        value = getattr(rule, each.name)
        if isinstance(rule, ClientRates | Trace):
            wanted = "one number for each client" if isinstance(rule, ClientRates) else "an array, rounds × clients"
            ndim = 1 if isinstance(rule, ClientRates) else 2
            if getattr(value, "ndim", None) != ndim:
                hint = "; fed.load_trace reads a file" if isinstance(value, str) else ""
                raise ParameterError(each.name, f"must be {wanted}, got {value!r}{hint}")
        elif not _is_number(value):
            raise ParameterError(each.name, f"must be a number, got {value!r}")


def _is_number(value: Any) -> bool:
    return is_real(value) or getattr(value, "ndim", None) == 0


class Attendance(NamedTuple):
    """The attendance of a cohort, and the duration of the round.

    Attributes:
      status: ABSENT, DROPPED, LATE or REPORTED for each client, [C].
      seconds: simulated duration of the round.
      ends: seconds after which each visit ends, [C]: the client reports, the server no longer waits, or it notices that
        the client does not come.
    """

    status: Int8[Array, "C"]
    seconds: Float[Array, ""]
    ends: Float[Array, "C"]


def attend(
    participation: Participation,
    key: Key[Array, ""],
    traits_key: Key[Array, ""],
    clients: Int[Array, "C"],
    moment: Int[Array, ""] | Float[Array, ""],
    work: Work,
) -> Attendance:
    """Decide which clients of the cohort report, and how long the server waits.

    The server waits for the slowest client that reports. If there is a deadline and a client that came does not report
    by then, the server waits until the deadline. Without a deadline it notices at once that a client drops out.

    Args:
      participation: the rules.
      key: the presence key of the round.
      traits_key: the traits key of the run.
      clients: the ids of the cohort, [C].
      moment: r, or the simulated seconds for an availability that reads the clock.
      work: the work of each client.
    """
    available, dropped = jnp.ones(clients.shape, bool), jnp.zeros(clients.shape, bool)
    late, each = dropped, jnp.zeros(clients.shape, jnp.float32)
    if participation.availability is not None:
        available = participation.availability(fold_in(key, 0), fold_in(traits_key, 0), clients, moment)
    if participation.dropout is not None:
        dropped = _uniform(fold_in(key, 1), clients) < participation.dropout
    if participation.fleet is not None:
        each = participation.fleet.seconds(fold_in(traits_key, 1), clients, work)
        if participation.deadline is not None:
            late = each > participation.deadline
    status = jnp.select([~available, dropped, late], [ABSENT, DROPPED, LATE], REPORTED).astype(jnp.int8)
    ends = jnp.where(status == REPORTED, each, 0).astype(jnp.float32)
    seconds = ends.max()
    if participation.deadline is not None:
        missing = (status == DROPPED) | (status == LATE)
        seconds = jnp.where(missing.any(), participation.deadline, seconds)
        ends = jnp.where(missing, participation.deadline, ends)
    return Attendance(status, seconds.astype(jnp.float32), ends.astype(jnp.float32))
