"""What one method costs in units of another's, from runs that share their seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hiso_jax.checks import ParameterError, is_real

# Of fewer pairs an interval would be as wide as the question: Student's t has 12.7 standard errors at 2.
FEWEST_PAIRS = 5
CONFIDENCE = 0.95
FIGURES = {
    "rounds": ("rounds",),
    "bytes_up": ("bytes_up",),
    "bytes": ("bytes_up", "bytes_down"),
    "forward_passes": ("forward_passes",),
    "simulated_seconds": ("simulated_seconds",),
}
"""What is counted to the target, and which totals of a whole run it is a part of."""


@dataclass(frozen=True)
class Ratio:
    """The geometric mean of paired ratios.

    Attributes:
      value: the mean; where ``bound`` is set it is only that.
      low, high: its 95 % interval, Student's t on the logarithms; None of fewer than 5 pairs, or of a bound.
      pairs: how many there are.
      bound: "least" where runs of the method never reached the target, which were counted as if they had at their
        end, or runs of the baseline were at it before their first round, which were counted as if they took one;
        "most" where this is so of the baseline and of the method; else None.
    """

    value: float
    low: float | None
    high: float | None
    pairs: int
    bound: str | None = None


def check_figures(run: Any) -> None:
    """Refuse figures of a run that a comparison cannot read, of a file that somebody edited.

    Raises:
      ValueError: one is missing, or is none that it can be; it is named.
    """
    if not isinstance(run, Mapping):
        raise ParameterError("figures", "must be an object")
    totals = {name for names in FIGURES.values() for name in names}
    numbers = {"seed", "rounds", "rounds_planned"}
    maybe = {f"{figure}_to_target" for figure in FIGURES} | totals - numbers | {"diverged_at_round", "worst_tenth"}
    metric = run.get("metric")
    if not isinstance(metric, str):
        raise ParameterError("figures", "must name their metric")
    for name in (*sorted(numbers), *sorted(maybe), metric):
        value = run.get(name)
        if name not in run or not (is_real(value) or (value is None and name not in numbers)):
            raise ParameterError(name, f"must be a number, got {value!r}")


def to_target(run: dict[str, Any], figure: str) -> float | None:
    """What a run took to reach the target, or None if it did not."""
    return run[f"{figure}_to_target"]


def _whole(run: dict[str, Any], figure: str) -> float | None:
    """What the whole run took, had it come to its end."""
    totals = [run[name] for name in FIGURES[figure]]
    if any(total is None for total in totals) or not run["rounds"]:
        return None
    return sum(totals) * _planned(run) / run["rounds"]


def _planned(run: dict[str, Any]) -> int:
    return run.get("rounds_planned", run["rounds"])


def _counted(run: dict[str, Any], figure: str) -> float | None:
    """The cost to the target; the whole cost if the run never got there, one round's if it began there."""
    took, whole = to_target(run, figure), _whole(run, figure)
    if took is None or took > 0:
        return whole if took is None else took
    return None if whole is None else whole / _planned(run)


def paired_ratio(
    runs: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]], figure: str = "rounds"
) -> Ratio | None:
    """What a method took to the target in units of what a baseline took, seed by seed.

    A run that never got there is censored: it took at least as much as it had. A run that began there took nothing,
    less than one round. Of a pair in which neither got there, or both began there, nothing is known, and it is left
    out.

    Args:
      runs: summaries of a method's runs.
      baseline: those of the baseline's.
      figure: of :data:`FIGURES`.

    Returns:
      None where no pair tells anything, or pairs tell opposite bounds.
    """
    own, others = ({run["seed"]: run for run in each} for each in (runs, baseline))
    logs, bounds = [], set()
    for seed in sorted(own.keys() & others.keys()):
        took, base = to_target(own[seed], figure), to_target(others[seed], figure)
        if took == base and not took:
            continue
        cost, other = _counted(own[seed], figure), _counted(others[seed], figure)
        if not cost or not other:
            continue
        if took is None or base == 0:
            bounds.add("least")
        if base is None or took == 0:
            bounds.add("most")
        logs.append(math.log(cost / other))
    if not logs or len(bounds) > 1:
        return None
    mean, low, high = interval(logs)
    if bounds:
        return Ratio(math.exp(mean), None, None, len(logs), bounds.pop())
    return Ratio(
        math.exp(mean), None if low is None else math.exp(low), None if high is None else math.exp(high), len(logs)
    )


def interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The mean of some values, and its 95 % interval by Student's t, from five values on."""
    mean = float(np.mean(values))
    if len(values) < FEWEST_PAIRS:
        return mean, None, None
    from scipy import stats

    error = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return mean, float(mean - error), float(mean + error)
