"""Availabilities by name: which invited clients come to a round, as in ``--availability`` and ``Experiment``.

An availability is a factory ``name(*, options)`` that returns a :class:`hiso_jax.fed.Availability`, or None if every
invited client comes.
"""

from pathlib import Path

from hiso_jax import fed
from hiso_jax.checks import ParameterError, between, positive
from hiso_jax.choices import Kind


def always() -> None:
    """Every invited client comes."""


def bernoulli(*, availability_rate: float = 0.8) -> fed.Bernoulli:
    """Every client comes with the same probability.

    Args:
      availability_rate: mean probability that a client comes.

    Raises:
      ParameterError: ``availability_rate`` is not in [0, 1].
    """
    between("availability_rate", availability_rate, 0, 1)
    return fed.Bernoulli(availability_rate)


def per_client(*, availability_rate: float = 0.8, availability_spread: float = 0.2) -> fed.UniformRates:
    """Every client comes with its own probability.

    Args:
      availability_rate: mean probability that a client comes.
      availability_spread: largest distance of a client's probability from the mean; probabilities are uniform within
        this distance and [0, 1].

    Raises:
      ParameterError: ``availability_rate`` or ``availability_spread`` is not in [0, 1].
    """
    between("availability_rate", availability_rate, 0, 1)
    between("availability_spread", availability_spread, 0, 1)
    # Limited so that the mean stays as given.
    spread = min(availability_spread, availability_rate, 1 - availability_rate)
    return fed.UniformRates(availability_rate - spread, availability_rate + spread)


def diurnal(
    *, availability_rate: float = 0.8, rounds_per_day: float = 100.0, seconds_per_day: float | None = None
) -> fed.Diurnal:
    """Clients come by the time of day.

    Args:
      availability_rate: mean probability that a client comes.
      rounds_per_day: period of the wave, from twice the mean, at most 1, to as far below the mean; each client has its
        own time zone.
      seconds_per_day: the period in seconds of the simulated clock, in place of rounds.

    Raises:
      ParameterError: ``availability_rate`` is not in [0, 1], or a period is not positive and finite.
    """
    between("availability_rate", availability_rate, 0, 1)
    positive("rounds_per_day", rounds_per_day)
    amplitude = min(1.0, 1 / availability_rate - 1) if availability_rate else 0.0
    if seconds_per_day is not None:
        positive("seconds_per_day", seconds_per_day)
        return fed.Diurnal(availability_rate, amplitude, seconds_per_day, in_seconds=True)
    return fed.Diurnal(availability_rate, amplitude, rounds_per_day)


def trace(*, trace: Path | None = None) -> fed.Trace:
    """Clients come as recorded in a file.

    Args:
      trace: .npy or .csv file of 0s and 1s, one row per round and one column per client; both repeat from the start.

    Raises:
      ParameterError: no file is given, or it is not a table of 0s and 1s.
    """
    if trace is None:
        raise ParameterError("trace", "must be given with availability trace: a .npy or .csv file")
    return fed.load_trace(trace)


AVAILABILITIES = Kind(
    "availability",
    {"always": always, "bernoulli": bernoulli, "per-client": per_client, "diurnal": diurnal, "trace": trace},
    returns="Availability",
    is_valid=lambda made: made is None or callable(made),
    group="hiso_jax.availabilities",
)
