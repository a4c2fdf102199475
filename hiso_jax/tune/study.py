"""The settings of studies, which run many settings: those of ``sweep``, and those shared with ``compare``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from hiso_jax.checks import ParameterError, integer, positive
from hiso_jax.choices import Listed
from hiso_jax.experiment import Settings

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
    """

    mus: Annotated[tuple[float, ...] | None, Listed(float, "X,Y,…")] = None

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
          ValueError: an option is out of range; the error names the first.
        """
        super().__post_init__()
        _check_grid("mus", self.mus or ())
