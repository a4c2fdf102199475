"""The cost of one method relative to another, from runs that share their seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hiso_jax.checks import ParameterError, is_real

# With fewer pairs an interval is too wide to help: Student's t has 12.7 standard errors at 2 pairs.
FEWEST_PAIRS = 5
CONFIDENCE = 0.95
FIGURES = {
    "rounds": ("rounds",),
    "bytes_up": ("bytes_up",),
    "bytes": ("bytes_up", "bytes_down"),
    "forward_passes": ("forward_passes",),
    "simulated_seconds": ("simulated_seconds",),
}
"""The figures that are counted to the target → the totals of an entire run that they are a part of."""


@dataclass(frozen=True)
class Ratio:
    """The geometric mean of paired ratios.

    Attributes:
      value: the mean; only a bound on it if ``bound`` is set.
      low, high: its 95 % interval, Student's t on the logarithms; None for fewer than 5 pairs, or for a bound.
      pairs: the number of pairs.
      bound: "least" if runs of the method never reached the target and count as if they had at their end, or runs of
        the baseline were at the target before their first round and count as if they took one round; "most" if the
        same holds with the method and the baseline exchanged; else None.
    """

    value: float
    low: float | None
    high: float | None
    pairs: int
    bound: str | None = None


def baseline_of(algorithms: Sequence[str], named: str | None) -> str:
    """The method whose costs are 1: the named one; else decomfl with any channels, or else the first method."""
    plain = [name for name in algorithms if name.partition("+")[0] == "decomfl"]
    # Of several, the shortest name.
    return named or min(plain, key=len, default=algorithms[0])


def check_figures(run: Any) -> None:
    """Refuse figures of a run that a comparison cannot read, for example from an edited file.

    Raises:
      ValueError: a figure is missing or has an invalid value; the error names it.
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
    """The cost of a run up to the target, or None if it did not reach the target."""
    return run[f"{figure}_to_target"]


def _whole(run: dict[str, Any], figure: str) -> float | None:
    """The cost of the entire run, extrapolated to its planned rounds; None if it is unknown."""
    totals = [run[name] for name in FIGURES[figure]]
    if any(total is None for total in totals) or not run["rounds"]:
        return None
    return sum(totals) * _planned(run) / run["rounds"]


def _planned(run: dict[str, Any]) -> int:
    return run.get("rounds_planned", run["rounds"])


def _counted(run: dict[str, Any], figure: str) -> float | None:
    """The cost to the target; that of the entire run if it never reached it, that of one round if it began there."""
    took, whole = to_target(run, figure), _whole(run, figure)
    if took is None or took > 0:
        return whole if took is None else took
    return None if whole is None else whole / _planned(run)


def paired_ratio(
    runs: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]], figure: str = "rounds"
) -> Ratio | None:
    """The cost of a method to the target relative to the cost of a baseline, paired by seed.

    A run that never reached the target is censored: its cost is at least that of the entire run. A run that began at
    the target cost nothing, less than one round. A pair is left out if neither run reached the target or both began
    there, because its ratio is unknown.

    Args:
      runs: summaries of the method's runs.
      baseline: summaries of the baseline's runs.
      figure: a name in :data:`FIGURES`.

    Returns:
      The ratio; None if no pair has a known ratio, or if pairs give opposite bounds.
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
    """The mean of the values, and its 95 % interval by Student's t if there are at least five."""
    mean = float(np.mean(values))
    if len(values) < FEWEST_PAIRS:
        return mean, None, None
    from scipy import stats

    error = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return mean, float(mean - error), float(mean + error)
