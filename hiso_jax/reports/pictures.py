"""The picture of a sweep, and what figures share."""

import io
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hiso_jax import fed
from hiso_jax.reports.text import short_names


def empty_figure(width: float, height: float) -> Any:
    """An empty figure, its size in inches. A notebook shows it as a picture."""
    # Not pyplot, because it keeps global state and picks a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            content = io.BytesIO()
            self.savefig(content, format="png", dpi=150)
            return content.getvalue()

    figure = Shown(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def rates_picture(results: Mapping[str, fed.SweepResult], target: float | None, path: Path) -> None:
    """Draw the final metric and rounds to the target against the learning rate, a line per method, μ and clients' rate.

    Points are means over the seeds, bars one standard deviation. A rate that did not reach the target with every seed
    has no point in the right plot.
    """
    figure = empty_figure(9.6, 3.8)
    ends, soon = figure.subplots(1, 2, sharex=True)
    names, lines = short_names(list(results)), itertools.count()
    for name, result in results.items():
        first = None if target is None else result.rounds_to(target)
        rates, all_local = np.array(result.learning_rates), result.local_rates or (None,)
        for (m, mu), local in itertools.product(enumerate(result.mus), dict.fromkeys(all_local)):
            label = f"{names[name]}, mu {mu:g}" if len(result.mus) > 1 else names[name]
            label += "" if local is None else f", clients' rate {local:g}"
            own = np.array([each == local for each in all_local]) if local is not None else np.ones(len(rates), bool)
            # Explicit colors, because a line missing from one plot would shift all later colors there.
            style = {"label": label, "color": f"C{next(lines)}", "marker": "o", "markersize": 4, "capsize": 2}
            for axis, values in ((ends, result.final()), (soon, first)):
                if values is not None:
                    runs = values[:, m, own]
                    reached = np.isfinite(runs).all(0)
                    if not reached.any():
                        continue
                    mean = np.where(reached, runs.mean(0), np.nan)
                    bars = np.where(np.isfinite(mean), np.where(np.isfinite(runs), runs, 0).std(0), np.nan)
                    axis.errorbar(rates[own], mean, bars, **style)
    metric = next(iter(results.values())).metric.name.replace("_", " ")
    ends.set_ylabel(f"final validation {metric}")
    soon.set_ylabel("rounds to the target" if target is None else f"rounds to {metric} {target:g}")
    for axis in (ends, soon):
        plain_log_axis(axis)
        axis.set_xlabel("learning rate")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    soon.set_ylim(0, max(1, *(result.rounds[-1] for result in results.values())))
    if not soon.containers:
        soon.text(0.5, 0.5, "no setting reached it with every seed", transform=soon.transAxes, ha="center", color="0.4")
    if ends.containers:
        ends.legend(frameon=False)
    figure.savefig(path, dpi=120)


def plain_log_axis(axis: Any) -> None:
    """A logarithmic axis whose ticks are plain numbers, also between powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
