"""The tables of ``benchmarks/projections.py``, from its JSON files.

python benchmarks/projections_report.py benchmarks/results/projections_digits.json
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from scipy import stats


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      results: JSON files of one task.
      targets: accuracies, comma-separated; a target is attained by the mean of three evaluations.
    """

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
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


def main(arguments: Arguments) -> None:
    """Read the files, and print the table."""
    rows = {row["entry"]: row for path in arguments.results for row in json.loads(path.read_text())["rows"]}
    table(rows, [float(word) for word in arguments.targets.split(",")])


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__.split("\n")[0]))
