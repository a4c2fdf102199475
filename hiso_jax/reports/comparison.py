"""Several methods in one table."""

from collections.abc import Callable
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from hiso_jax import fed
from hiso_jax.reports.text import NEVER, human_bytes, human_count, human_seconds, short_names, spread


def comparison_table(summaries: dict[str, list[dict[str, Any]]], metric: fed.Metric, target: float | None) -> Table:
    """One row a method: the final metric, and what it took to the shared target; mean ± spread over seeds."""
    name = metric.name.replace("_", " ")
    title = None if target is None else f"what it took to test {name} {target:g} (time: simulated)"
    # Narrow enough for 80 columns.
    view = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    view.add_column("method", overflow="fold")
    for column in ("rate", name, "rounds", "passes", "bytes", "time"):
        view.add_column(column, justify="right", no_wrap=True)
    names = short_names(list(summaries))
    for method, runs in summaries.items():
        if not runs:
            continue
        diverged = sum(run["diverged_at_round"] is not None for run in runs)
        final = spread(np.array([run[metric.name] for run in runs]), lambda value: f"{value:.4f}")
        view.add_row(
            names[method],
            f"{runs[0]['learning_rate']:g}",
            f"diverged ({diverged} of {len(runs)})" if diverged else final,
            _to_target(runs, "rounds_to_target", lambda value: f"{value:.0f}"),
            # All three follow the rounds, and so does their spread.
            _to_target(runs, "forward_passes_to_target", human_count, with_spread=False),
            _to_target(runs, "bytes_to_target", human_bytes, with_spread=False),
            _to_target(runs, "simulated_seconds_to_target", human_seconds, with_spread=False),
        )
    return view


def _to_target(
    runs: list[dict[str, Any]], figure: str, show: Callable[[float], str], *, with_spread: bool = True
) -> str:
    reached = np.array([run[figure] for run in runs if run[figure] is not None])
    if len(reached) < len(runs):
        # A mean over the seeds that got there would flatter the method.
        return f"{NEVER} ({len(reached)} of {len(runs)})" if len(reached) and with_spread else NEVER
    return spread(reached if with_spread else reached.mean(keepdims=True), show)
