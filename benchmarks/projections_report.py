"""The picture and the tables of ``benchmarks/projections.py``, from its JSON files.

python benchmarks/projections_report.py benchmarks/results/projections_digits.json --picture docs/projections.png
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import tyro
from scipy import stats

# The entries of the picture → their names in it.
SHOWN = {
    "FedAvg K = 5": "FedAvg, 5 local steps (vectors)",
    "hadamard K = 5, 128 × 1 bit": "local_mosaic, 5 local steps",
    "mosaic, 64 × 2 bits": "mosaic, forward passes only",
    "decomfl": "DeComFL, forward passes only",
}


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      results: JSON files of one task.
      picture: PNG to write.
      targets: accuracies, comma-separated; a target is attained by the mean of three evaluations.
    """

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    picture: Path | None = None
    targets: str = "0.9"


def reached(curve: list[float], target: float, every: int) -> float:
    """The round of the first evaluation whose mean with the next two attains the target."""
    for place in range(len(curve)):
        if np.mean(curve[place : place + 3]) >= target:
            return float(place * every)
    return math.inf


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean and its 95 % interval."""
    if not np.isfinite(values).all():
        return math.inf, math.nan, math.inf
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def table(rows: dict[str, Any], targets: list[float]) -> None:
    """Print markdown: rounds, ratios, bytes and forward passes of every entry."""
    print("| entry | rates | to | rounds [95 %] | of decomfl's | of FedAvg's | bytes up | forward passes | final |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        curves = row["accuracy"]
        each = isinstance(curves[0], list)
        for target in targets if each else targets[:1]:
            own = np.array([reached(curve, target, row["every"]) for curve in curves] if each else row["rounds"])
            mean, low, high = interval(own)
            shares = []
            for other in ("decomfl", "FedAvg K = 5"):
                base = rows.get(other)
                known = base is not None and np.isfinite(own).all() and np.isfinite(base["rounds"]).all()
                if known and target == targets[0] and len(own) == len(base["rounds"]):
                    logs = np.log(own) - np.log(base["rounds"])
                    shares.append("{:.3g} ({:.3g} to {:.3g})".format(*np.exp(interval(logs))))
                else:
                    shares.append("")
            rates = f"{row['server_rate']:.3g}" + ("" if row["local_rate"] is None else f", {row['local_rate']:.3g}")
            costs = [f"{mean * row[cost]:,.0f}" for cost in ("bytes_up", "forward_passes")]
            print(
                f"| {name} | {rates} | {target:g} | {mean:.1f} [{low:.1f}, {high:.1f}] | {' | '.join(shares)} | "
                f"{' | '.join(costs)} | {np.mean(row['final']):.3f} |"
            )


def picture(rows: dict[str, Any], path: Path) -> None:
    """Mean accuracy against bytes up and against forward passes of a client that comes to every round."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for place, (name, label) in enumerate(SHOWN.items()):
        row = rows[name]
        curve = np.array(row["accuracy"])
        mean = curve.mean(0) if curve.ndim > 1 else curve
        rounds = np.arange(len(mean)) * row["every"]
        for axis, cost in zip(axes, ("bytes_up", "forward_passes"), strict=True):
            axis.plot(rounds[1:] * row[cost], mean[1:], color=f"C{place}", label=label, linewidth=1.6)
    for axis, words in zip(axes, ("bytes up of a client", "forward passes of a client"), strict=True):
        axis.set_xscale("log")
        axis.set_xlabel(f"{words}, summed over the rounds")
        axis.axhline(0.9, color="0.7", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test accuracy")
    axes[0].set_ylim(0.2, 1)
    axes[1].legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path, dpi=150)


def main(arguments: Arguments) -> None:
    """Read the files, print the table, and draw the picture if asked."""
    rows = {row["entry"]: row for path in arguments.results for row in json.loads(path.read_text())["rows"]}
    table(rows, [float(word) for word in arguments.targets.split(",")])
    if arguments.picture is not None:
        picture(rows, arguments.picture)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__.split("\n")[0]))
