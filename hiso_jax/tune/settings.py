"""The settings of comparisons and sweeps."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from hiso_jax.checks import ParameterError, integer, positive
from hiso_jax.choices import Listed
from hiso_jax.experiment import Settings
from hiso_jax.fed.run import FEWEST_TRIES
from hiso_jax.reports import baseline_of
from hiso_jax.schedules import SCHEDULES

ALGORITHMS = ("hiso", "decomfl")


@dataclass(frozen=True, kw_only=True)
class Study(Settings):
    """The settings that ``sweep`` and ``compare`` share.

    Attributes:
      algorithms: methods, each named as for --algorithm of run.
      learning_rate: learning rates to try with every method; by default a grid for the kind of model.
      resume: directory of a sweep or a comparison to continue where it was ended, with its options; processes that
        continue one comparison side by side share its methods.
      seeds: number of seeds to run for each method, counted up from --seed.
      out: directory to write, which must not exist; by default a new one under runs/.
      validation: training examples held out for tuning, by default a fifth of them; tuning never reads the test split.
    """

    algorithms: Annotated[tuple[str, ...], Listed(str, "A,B,…")] = ALGORITHMS
    learning_rate: Annotated[tuple[str, ...] | None, Listed(str, "X,Y,…")] = None
    seeds: int = 1
    validation: int | None = None
    out: Path | None = None
    resume: Path | None = None

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
          ValueError: an option is out of range; the error names the first.
        """
        super().__post_init__()
        integer("seeds", self.seeds, 1)
        if len(set(self.algorithms)) != len(self.algorithms):
            raise ParameterError("algorithms", f"must not repeat, got {','.join(self.algorithms)}")
        self._check_rates()

    def _check_rates(self) -> None:
        _check_grid("learning_rate", self.rates)

    @property
    def rates(self) -> tuple[float, ...]:
        """The given rates to try; empty if none are given."""
        return tuple(as_number("learning_rate", word) for word in self.learning_rate or ())


def as_number(option: str, word: str) -> float:
    """A word as a number.

    Raises:
      ValueError: the word is not a number.
    """
    try:
        return float(word)
    except ValueError:
        raise ParameterError(option, f"must be numbers, comma-separated, got {word!r}") from None


def _check_grid(option: str, values: tuple[float, ...]) -> None:
    for value in values:
        positive(option, value)
    if len(set(values)) != len(values):
        raise ParameterError(option, f"must not repeat, got {','.join(map(str, values))}")


@dataclass(frozen=True, kw_only=True)
class Sweep(Study):
    """Try a grid of learning rates × seeds (× mu) as one program and report the best setting on a validation split.

    Attributes:
      mus: smoothing radii to try; by default --mu alone.
      local_learning_rates: rates of the clients' own steps to try with every learning rate, for methods that send
        scalars and take several local steps; by default --local-learning-rate alone.
    """

    mus: Annotated[tuple[float, ...] | None, Listed(float, "X,Y,…")] = None
    local_learning_rates: Annotated[tuple[float, ...] | None, Listed(float, "X,Y,…")] = None

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
          ValueError: an option is out of range; the error names the first.
        """
        super().__post_init__()
        _check_grid("mus", self.mus or ())
        _check_grid("local_learning_rates", self.local_learning_rates or ())
        if self.local_learning_rates and self.local_learning_rate is not None:
            raise ParameterError("local_learning_rates", "must not be given beside `local_learning_rate`")


# All clients are present: none is absent, drops out or is late.
CALM: dict[str, Any] = {"availability": "always", "dropout": 0.0, "deadline": None}


@dataclass(frozen=True, kw_only=True)
class Compare(Study):
    """Tune several methods with equal numbers of runs, run each at its best from the same start, and print one table.

    Attributes:
      protocol: goal: cost-to-target tunes for the fewest rounds to --target, quality-under-budget for the value at the
        end; robustness tunes with all clients present, and reports every run with and without the given --availability,
        --dropout and --deadline.
      budget: resource that limits every method to the cost of --rounds rounds of the baseline: rounds; passes, the
        forward passes of clients; bytes, sent up; or seconds, simulated. All methods are evaluated equally often.
      baseline: method in whose units the others' costs are given; by default decomfl, or else the first.
      schedules: schedules of the rate over the rounds, each tried with every method.
      tries: learning rates that every method tries with each schedule, at least 3: three around the method's own, then
        one at a time, beyond the best while it is at an edge, beside the best after that.
      tuning_seeds: runs of each learning rate, with seeds that are not reported.
      learning_rate: grid to try in place of the search; or NAME=X,NAME=X,… for fixed rates, each with the first of
        --schedules or, as NAME=X:SCHEDULE, its own. A single rate is fixed for every method.
      seeds: number of seeds to report for each method, counted up from --seed; from 5 on ratios have intervals.
    """

    algorithms: Annotated[tuple[str, ...], Listed(str, "A,B,…")] = ("decomfl", "hiso", "mosaic")
    protocol: Literal["cost-to-target", "quality-under-budget", "robustness"] = "cost-to-target"
    budget: Literal["passes", "rounds", "bytes", "seconds"] = "passes"
    baseline: str | None = None
    schedules: Annotated[tuple[str, ...], Listed(str, "A,B,…")] = ("constant", "cosine", "inverse-sqrt")
    tries: int = 5
    tuning_seeds: int = 2
    seeds: int = 3
    # ``schedules`` replaces ``schedule``.
    HIDDEN: ClassVar[tuple[str, ...]] = (*Study.HIDDEN, "schedule")

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
          ValueError: an option is out of range; the error names the first.
        """
        super().__post_init__()
        integer("tries", self.tries, FEWEST_TRIES)
        integer("tuning_seeds", self.tuning_seeds, 1)
        if self.baseline is not None and self.baseline not in self.algorithms:
            raise ParameterError(
                "baseline", f"must be one of the algorithms {', '.join(self.algorithms)}, got {self.baseline}"
            )
        for name in self.schedules:
            SCHEDULES.load(name)
        if len({*self.schedules}) < len(self.schedules):
            raise ParameterError("schedules", f"must not repeat, got {','.join(self.schedules)}")
        if self.protocol == "robustness" and all(getattr(self, name) == value for name, value in CALM.items()):
            raise ParameterError(
                "protocol", "robustness needs absent clients: give `availability`, `dropout` or `deadline`"
            )

    def in_calm(self) -> Self:
        """The same settings with all clients present."""
        return replace(self, protocol="cost-to-target", **CALM)

    @property
    def reference(self) -> str:
        """The name of the baseline."""
        return baseline_of(self.algorithms, self.baseline)

    def _check_rates(self) -> None:
        own = self.own_rates
        if own is None:
            super()._check_rates()
        elif set(own) != set(self.algorithms):
            raise ParameterError(
                "learning_rate",
                f"must name each of the algorithms {', '.join(self.algorithms)} once, as NAME=X, or none "
                f"of them; got {','.join(self.learning_rate or ())}",
            )

    @property
    def own_rates(self) -> dict[str, tuple[float, str]] | None:
        """Each method's given rate and schedule; None if the methods are to be tuned."""
        words = self.learning_rate or ()
        if any("=" in word for word in words):
            pairs = [word.rpartition("=") for word in words]
            names = [name.strip() for name, _, _ in pairs]
            if len({*names}) < len(names):
                raise ParameterError("learning_rate", f"must name each algorithm once, got {','.join(words)}")
            own = {name: self._with_schedule(word) for name, (_, _, word) in zip(names, pairs, strict=True)}
        elif len(words) == 1:
            own = dict.fromkeys(self.algorithms, self._with_schedule(words[0]))
        else:
            return None
        return own

    def _with_schedule(self, word: str) -> tuple[float, str]:
        number, colon, schedule = word.partition(":")
        if colon and schedule not in SCHEDULES.factories:
            raise ParameterError(
                "learning_rate", f"must name one of the schedules {', '.join(SCHEDULES.factories)}, got {schedule!r}"
            )
        rate = as_number("learning_rate", number)
        positive("learning_rate", rate)
        return rate, schedule or self.schedules[0]
