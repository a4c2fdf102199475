"""The results of several methods, as JSON and as a table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from hiso_jax import fed
from hiso_jax.reports.paired import FIGURES, interval, paired_ratio
from hiso_jax.reports.text import NEVER, broken, human_bytes, human_count, human_seconds, short_names

SHORT = {"constant": "constant", "cosine": "cosine", "linear": "linear", "inverse-sqrt": "1/√"}


def _short(schedule: str) -> str:
    """The name of a schedule in a table; for a user's file the name of its function."""
    return SHORT.get(schedule, schedule.rpartition(":")[2])


@dataclass(frozen=True)
class Compared:
    """A method of a comparison, with its runs.

    Attributes:
      tuned: its rate and schedule, and all trials.
      runs: the summaries of its runs, one per seed.
      histories: the evaluations of these runs.
    """

    tuned: Mapping[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)
    histories: list[list[fed.Evaluation]] = field(default_factory=list)


def as_results(compared: Mapping[str, Compared], baseline: str) -> dict[str, dict[str, Any]]:
    """The result of a comparison as JSON: by method its setting, its runs and its cost to the target.

    ``ratios`` holds for each figure the ratio to the baseline, paired by seed; see :class:`hiso_jax.reports.Ratio`.
    """
    base = compared[baseline].runs if baseline in compared else []
    results = {}
    for name, done in compared.items():
        ratios = {figure: paired_ratio(done.runs, base, figure) for figure in FIGURES}
        results[name] = {
            **done.tuned,
            "runs": done.runs,
            "reached": sum(run["rounds_to_target"] is not None for run in done.runs),
            "diverged": sum(run["diverged_at_round"] is not None for run in done.runs),
            "ratios": {figure: None if ratio is None else asdict(ratio) for figure, ratio in ratios.items()},
            "cost_of_trouble": _cost_of_trouble(done.runs),
        }
    return results


def _cost_of_trouble(runs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The metric lost to absent, dropped and late clients, by run; None unless every run was also made without them."""
    if any("in_calm" not in run for run in runs):
        return None
    lost = [run["in_calm"][run["metric"]] - run[run["metric"]] for run in runs]
    mean, low, high = interval(lost)
    return {"mean": mean, "low": low, "high": high}


def comparison_table(
    compared: Mapping[str, Compared],
    results: Mapping[str, dict[str, Any]],
    metric: fed.Metric,
    target: float | None,
    baseline: str,
) -> Table:
    """A table with a row per method: its cost to the shared target, the ratio to the baseline, and its final metric."""
    words = metric.name.replace("_", " ")
    names = short_names(list(compared))
    title = f"test {words} at the end" if target is None else f"what it took to test {words} {target:g}"
    # Two lines per method, so that the table fits into 80 columns.
    view = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    view.add_column("method", overflow="fold")
    view.add_column("rate", justify="right", no_wrap=True)
    for column in ("rounds", f"of {broken(names.get(baseline, baseline))}", "bytes up\nall", "passes\ntime"):
        if target is not None:
            view.add_column(column, justify="right", overflow="fold")
    view.add_column(f"{words}\nworst tenth", justify="right", no_wrap=True)
    calm = any("in_calm" in run for done in compared.values() for run in done.runs)
    if calm:
        view.add_column("lost to\ntrouble", justify="right", no_wrap=True)
    for name, done in compared.items():
        runs, ratio = done.runs, results[name]["ratios"]["rounds"]
        taken = [
            _rounds(runs),
            NEVER if ratio is None else ratio_words(ratio),
            f"{_mean(runs, 'bytes_up', human_bytes)}\n{_mean(runs, 'bytes', human_bytes)}",
            f"{_mean(runs, 'forward_passes', human_count)}\n{_mean(runs, 'simulated_seconds', human_seconds)}",
        ]
        view.add_row(
            broken(names[name]),
            f"{done.tuned['learning_rate']:.3g}\n{_short(done.tuned['schedule'])}",
            *(taken if target is not None else []),
            f"{_final(runs, metric)}\n{_worst(runs)}",
            *([_lost(results[name]["cost_of_trouble"])] if calm else []),
        )
    return view


def ratio_words(ratio: Mapping[str, Any]) -> str:
    """A ratio and its interval on two lines."""
    sign = {"least": "≥ ", "most": "≤ ", None: ""}[ratio["bound"]]
    own = f"{sign}{ratio['value']:.3g}"
    # The ratio of the baseline to itself is not a measurement.
    return own if ratio["low"] in (None, ratio["high"]) else f"{own}\n{ratio['low']:.2g}–{ratio['high']:.2g}"


def _lost(cost: Mapping[str, Any] | None) -> str:
    if cost is None:
        return NEVER
    within = "" if cost["low"] is None else f"\n{cost['low']:.3f}–{cost['high']:.3f}"
    return f"{cost['mean']:.3f}{within}"


def _rounds(runs: Sequence[dict[str, Any]]) -> str:
    reached = [run["rounds_to_target"] for run in runs if run["rounds_to_target"] is not None]
    if len(reached) < len(runs):
        # A mean over only the seeds that reached the target would flatter the method.
        return f"{NEVER}\n{len(reached)} of {len(runs)}"
    return f"{np.mean(reached):.0f}" + (f"\n± {np.std(reached, ddof=1):.0f}" if len(reached) > 1 else "")


def _mean(runs: Sequence[dict[str, Any]], figure: str, show: Callable[[float], str]) -> str:
    each = [run[f"{figure}_to_target"] for run in runs]
    return NEVER if None in each else show(float(np.mean(each)))


def _final(runs: Sequence[dict[str, Any]], metric: fed.Metric) -> str:
    diverged = sum(run["diverged_at_round"] is not None for run in runs)
    if diverged:
        return f"diverged {diverged} of {len(runs)}"
    ends = [run[metric.name] for run in runs]
    return f"{np.mean(ends):.3f}" + (f" ± {np.std(ends, ddof=1):.3f}" if len(ends) > 1 else "")


def _worst(runs: Sequence[dict[str, Any]]) -> str:
    each = [run.get("worst_tenth") for run in runs]
    finite = [value for value in each if value is not None and np.isfinite(value)]
    return f"{np.mean(finite):.3f}" if len(finite) == len(runs) else NEVER
