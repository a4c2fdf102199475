"""The pictures of the documentation, drawn from the measurements in ``benchmarks/results``.

    python docs/pictures.py

It writes the SVG files of ``docs/images``.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
# The entries of projections_digits.json → (name, what it sends and does, colour, place and side of its label).
SHOWN = {
    "hadamard K = 5, 128 × 1 bit": (
        "local_mosaic",
        "20 bytes a round,\nbackpropagation",
        "#2f5fd0",
        (66, 0.63),
        "right",
    ),
    "mosaic, 64 × 2 bits": ("mosaic", "20 bytes\na round,\nforward\npasses", "#d9480f", (235, 0.4), "left"),
    "decomfl": ("DeComFL", "20 bytes a round,\nforward passes", "#7a828c", (2900, 0.53), "left"),
    "FedAvg K = 5": ("FedAvg", "9,640 bytes a round,\nbackpropagation", "#1b1f24", (40_000, 0.61), "left"),
}
TARGET = 0.9
UNITS = {1e2: "100 B", 1e3: "1 kB", 1e4: "10 kB", 1e5: "100 kB", 1e6: "1 MB"}


def measured() -> dict[str, Any]:
    """The entries of the measurement, by name."""
    rows = json.loads((RESULTS / "projections_digits.json").read_text())["rows"]
    return {row["entry"]: row for row in rows}


def curve(row: dict[str, Any], cost: str) -> tuple[np.ndarray, np.ndarray]:
    """(cost so far, mean accuracy) after each evaluation but the first, which cost nothing."""
    accuracy = np.array(row["accuracy"])
    mean = accuracy.mean(0) if accuracy.ndim > 1 else accuracy
    return (np.arange(len(mean)) * row["every"] * row[cost])[1:], mean[1:]


def bare(axis: Any, words: str) -> None:
    """Set the scales, labels and lines that all panels share."""
    axis.set_xscale("log")
    axis.set_xlabel(words)
    axis.set_ylim(0.1, 1.0)
    axis.axhline(TARGET, color="0.75", linewidth=0.8, zorder=0)
    axis.spines[["top", "right"]].set_visible(False)


def bytes_at_a_glance(rows: dict[str, Any]) -> Figure:
    """Accuracy against the bytes that a client sent, each line labelled where it reaches the target."""
    figure = Figure(figsize=(7.2, 3.5), layout="constrained")
    axis = figure.add_subplot()
    bare(axis, "bytes that a client has sent")
    for entry, (name, words, color, place, side) in SHOWN.items():
        axis.plot(*curve(rows[entry], "bytes_up"), color=color, linewidth=2)
        axis.text(*place, f"{name}\n{words}", color=color, fontsize=8, va="center", ha=side)
    axis.set_xticks(list(UNITS), list(UNITS.values()))
    axis.set_xlim(6, 4e6)
    axis.minorticks_off()
    axis.set_ylabel("test accuracy")
    axis.annotate("0.90", (7, TARGET), (0, 2), textcoords="offset points", fontsize=7, color="0.5")
    return figure


def bytes_and_passes(rows: dict[str, Any]) -> Figure:
    """Accuracy against bytes up and against forward passes of a client."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for entry, (name, _, color, _, _) in SHOWN.items():
        for axis, cost in ((left, "bytes_up"), (right, "forward_passes")):
            axis.plot(*curve(rows[entry], cost), color=color, linewidth=1.6, label=name)
    bare(left, "bytes that a client has sent")
    left.set_xticks(list(UNITS), list(UNITS.values()))
    bare(right, "forward passes of a client (a gradient counts three)")
    left.set_ylabel("test accuracy")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    return figure


def main() -> None:
    """Draw all pictures."""
    # The same file every time: no random ids, no date.
    mpl.rcParams["svg.hashsalt"] = "hiso-jax"
    rows = measured()
    for name, draw in (("bytes", bytes_at_a_glance), ("bytes_and_passes", bytes_and_passes)):
        draw(rows).savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
