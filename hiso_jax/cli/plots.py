"""Pictures of runs: loss and accuracy against rounds and against bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hiso_jax import fed

Histories = Mapping[str, Sequence[Sequence[fed.Evaluation]]]
SPREAD_OPACITY = 0.18


def curves(histories: Histories, path: Path, *, title: str, target: float | None = None) -> None:
    """Draw test loss and accuracy against rounds and total bytes, a line per method.

    Args:
      histories: name → the evaluations of its runs (one a seed); several are drawn as their mean with a band of
        one standard deviation, as far as all of them got.
      path: the PNG to write.
      title: of the picture.
      target: an accuracy to mark.
    """
    # Not pyplot: it keeps global state and picks a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for name, runs in histories.items():
        length = min(len(run) for run in runs)
        rounds = np.array([row.round for row in runs[0][:length]])
        total = np.mean([[row.bytes_up + row.bytes_down for row in run[:length]] for run in runs], 0) / 1e6
        for row, metric in enumerate(("loss", "accuracy")):
            values = np.array([[entry.metrics[metric] for entry in run[:length]] for run in runs])
            mean, spread = values.mean(0), values.std(0)
            for axis, abscissa in zip(axes[row], (rounds, total), strict=True):
                (line,) = axis.plot(abscissa, mean, label=name, linewidth=1.6)
                if len(runs) > 1:
                    axis.fill_between(
                        abscissa, mean - spread, mean + spread, alpha=SPREAD_OPACITY, color=line.get_color()
                    )
    for row, label in enumerate(("test loss", "test accuracy")):
        axes[row][0].set_ylabel(label)
    for axis, label in zip(axes[1], ("rounds", "bytes sent and received by all clients (MB)"), strict=True):
        axis.set_xlabel(label)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if target is not None:
        for axis in axes[1]:
            axis.axhline(target, color="0.4", linewidth=0.8, linestyle="--", label=f"target {target:g}")
    axes[1][0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
