"""Pictures of runs and sweeps."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hiso_jax import fed
from hiso_jax.reports.text import human_bytes, human_count, short_names

Histories = Mapping[str, Sequence[Sequence[fed.Evaluation]]]
SPREAD_OPACITY = 0.18
# Bytes that differ by a factor of FAR_APART get a logarithmic axis. A loss beyond FAR_UP times its start is cut.
FAR_APART = 20
FAR_UP = 3


def figure_of(width: float, height: float) -> Any:
    """An empty figure, its size in inches."""
    # Not pyplot, because it keeps global state and picks a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def rates_picture(results: Mapping[str, fed.SweepResult], target: float | None, path: Path) -> None:
    """Draw the final metric and rounds to the target against the learning rate, a line per method, μ and clients' rate.

    Points are means over the seeds, bars one standard deviation. A rate that did not reach the target with every seed
    has no point in the right plot.
    """
    figure = figure_of(9.6, 3.8)
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
        _plain_log_axis(axis)
        axis.set_xlabel("learning rate")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    soon.set_ylim(0, max(1, *(result.rounds[-1] for result in results.values())))
    if not soon.containers:
        soon.text(0.5, 0.5, "no setting reached it with every seed", transform=soon.transAxes, ha="center", color="0.4")
    if ends.containers:
        ends.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _leave_out_what_diverged(axes: Any, runs: Sequence[Sequence[fed.Evaluation]], name: str) -> None:
    """If a run rose far above the initial values, limit the axes to the others; its line leaves the picture."""
    begun = max(abs(run[0].metrics[name]) for run in runs)
    lowest = min((row.metrics[name] for run in runs for row in run if np.isfinite(row.metrics[name])), default=0.0)
    low, high = axes[0].get_ylim()
    if np.isfinite(begun) and high > FAR_UP * begun > 0:
        for axis in axes:
            axis.set_ylim(max(low, lowest - 0.1 * begun), 1.5 * begun)


def curves(histories: Histories, path: Path, *, title: str, metric: fed.Metric, target: float | None = None) -> None:
    """Draw the test loss, if any, and the metric that counts against rounds and total bytes, a line per method.

    Args:
      histories: name → the evaluations of its runs (one per seed); several runs are drawn as their mean with a band
        of one standard deviation, up to the end of the shortest run.
      path: the PNG to write.
      title: the title of the picture.
      metric: the metric that counts.
      target: a value of the metric to mark.
    """
    known = next(iter(histories.values()))[0][0].metrics
    shown = [*(["loss"] if "loss" in known and metric.name != "loss" else []), metric.name]
    figure = figure_of(9.6, 3.2 * len(shown))
    axes = figure.subplots(len(shown), 2, sharex="col", sharey="row", squeeze=False)
    names, largest, smallest = short_names(list(histories)), 0.0, np.inf
    for name, runs in histories.items():
        length = min(len(run) for run in runs)
        rounds = np.array([row.round for row in runs[0][:length]])
        total = np.mean([[row.bytes_up + row.bytes_down for row in run[:length]] for run in runs], 0)
        largest, smallest = max(largest, total[-1]), min(smallest, total[-1])
        for row, figures in enumerate(shown):
            values = np.array([[entry.metrics[figures] for entry in run[:length]] for run in runs])
            mean, spread = values.mean(0), values.std(0)
            for axis, abscissa in zip(axes[row], (rounds, total), strict=True):
                (line,) = axis.plot(abscissa, mean, label=names[name], linewidth=1.6)
                if len(runs) > 1:
                    axis.fill_between(
                        abscissa, mean - spread, mean + spread, alpha=SPREAD_OPACITY, color=line.get_color()
                    )
    for row, figures in enumerate(shown):
        axes[row][0].set_ylabel(f"test {figures.replace('_', ' ')}")
    for axis, label in zip(axes[-1], ("rounds", "sent and received by all clients"), strict=True):
        axis.set_xlabel(label)
    for axis in axes[:, 0]:
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if largest > FAR_APART * smallest > 0:
        for axis in axes[:, 1]:
            axis.set_xscale("log", nonpositive="mask")
    # Set after the scale, because a scale sets its own formatter.
    axes[-1][1].xaxis.set_major_formatter(lambda value, _: human_bytes(value))
    if shown[0] == "loss":
        _leave_out_what_diverged(axes[0], [run for runs in histories.values() for run in runs], "loss")
    if target is not None:
        for axis in axes[-1]:
            axis.axhline(target, color="0.4", linewidth=0.8, linestyle="--", label=f"target {target:g}")
    axes[-1][0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def comparison_picture(
    compared: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    path: Path,
    *,
    title: str,
    metric: fed.Metric,
    target: float | None,
) -> None:
    """Draw the metric against rounds, bytes up and forward passes; below, each method's cost relative to the baseline.

    Args:
      compared: name → an object whose ``histories`` are its evaluations, one list per seed.
      results: name → its ratios to the baseline, as :func:`hiso_jax.reports.as_results` makes them.
      path: the PNG to write.
      title: the title of the picture.
      metric: the metric that counts.
      target: a value of the metric to mark.
    """
    names, costs = short_names(list(compared)), ("round", "bytes_up", "forward_passes")
    shown = [name for name in compared if any(results[name]["ratios"].values())] if target is not None else []
    below = 0.9 + 0.26 * len(shown) if shown else 0.0
    figure = figure_of(11.5, 3.9 + below)
    grid = figure.add_gridspec(2 if shown else 1, 3, height_ratios=[3.6, below] if shown else [1])
    first: Any = None
    for column, (cost, words) in enumerate(
        zip(costs, ("rounds", "bytes up, all clients", "forward passes, all clients"), strict=True)
    ):
        axis = first = figure.add_subplot(grid[0, column], sharey=first)
        extremes = []
        for place, (name, done) in enumerate(compared.items()):
            length = min(len(run) for run in done.histories)
            values = np.array([[row.metrics[metric.name] for row in run[:length]] for run in done.histories])
            at = np.mean([[getattr(row, cost) for row in run[:length]] for run in done.histories], 0)
            mean, spread, color = values.mean(0), values.std(0), _color(place)
            axis.plot(at, mean, color=color, label=names[name], linewidth=1.4, linestyle=_dashes(place))
            if len(values) > 1:
                axis.fill_between(at, mean - spread, mean + spread, alpha=SPREAD_OPACITY / 2, color=color, lw=0)
            extremes.append(at[-1])
        if max(extremes) > 3 * min(extremes) > 0:
            axis.set_xscale("log", nonpositive="mask")
        elif cost != "round":
            human = human_bytes if cost == "bytes_up" else human_count
            axis.xaxis.set_major_formatter(lambda value, _, human=human: human(value))
        axis.set_xlabel(words)
        if target is not None:
            axis.axhline(target, color="0.4", linewidth=0.8, linestyle="--")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelleft=column == 0)
        if column == 0:
            axis.set_ylabel(f"test {metric.name.replace('_', ' ')}")
    figure.legend(*first.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    if shown:
        _forest(figure.add_subplot(grid[1, :]), [(names[name], results[name]["ratios"]) for name in shown])
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _color(place: int) -> str:
    return f"C{place % 10}"


def _dashes(place: int) -> str:
    return ("-", "--", ":")[place // 10 % 3]


def _plain_log_axis(axis: Any) -> None:
    """A logarithmic axis whose ticks are plain numbers, also between powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _forest(axis: Any, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Draw the ratios to the baseline with their intervals, a row per method; an arrow marks a bound."""
    figures = {"rounds": ("o", "C0"), "bytes_up": ("s", "C1"), "forward_passes": ("D", "C2")}
    for place, (_, ratios) in enumerate(rows):
        for offset, (figure, (marker, color)) in zip((-0.22, 0.0, 0.22), figures.items(), strict=True):
            ratio = ratios[figure]
            if ratio is None:
                continue
            marker = {"least": ">", "most": "<", None: marker}[ratio["bound"]]
            label = figure.replace("_", " ") if place == 0 else None
            axis.plot(ratio["value"], place + offset, marker, color=color, markersize=4.5, label=label)
            if ratio["low"] is not None:
                axis.plot([ratio["low"], ratio["high"]], [place + offset] * 2, color=color, linewidth=1.2)
    axis.axvline(1, color="0.4", linewidth=0.8, linestyle="--")
    _plain_log_axis(axis)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.invert_yaxis()
    axis.set_xlabel("what it took to the target, in the baseline's units (left is better)")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="best")
