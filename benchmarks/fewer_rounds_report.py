"""The tables and the picture of ``fewer_rounds.py``."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy import stats

FROM_SEEDS = 5
BASE = "decomfl"


def paired(ours: list[float], base: list[float]) -> tuple[float, float, float] | None:
    """The geometric mean of the ratios of paired figures and, from five seeds on, its 95 % t interval."""
    logs = np.log(np.array(ours, float) / np.array(base, float))
    mean = logs.mean()
    if len(logs) < FROM_SEEDS:
        return float(np.exp(mean)), float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    return float(np.exp(mean)), float(np.exp(mean - half)), float(np.exp(mean + half))


def figures(done: dict[str, Any], method: str, target: str, figure: str) -> list[float] | None:
    """The figure of every seed, or None if one of them missed the target."""
    found = [run["at"][target] for run in done["methods"][method]["runs"]]
    return None if any(each is None for each in found) else [each[figure] for each in found]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(done: dict[str, Any], method: str, target: str, figure: str) -> str:
    ours = figures(done, method, target, figure)
    base = figures(done, BASE, target, figure) if BASE in done["methods"] else None
    if ours is None or base is None:
        return "—"
    mean, low, high = paired(ours, base)
    return f"{mean:.3f}" if np.isnan(low) else f"{mean:.3f} ({low:.3f} – {high:.3f})"


def table(done: dict[str, Any], target: str, name: str) -> Table:
    """A table with one row for each method."""
    view = Table(
        title=f"{name}, to accuracy {target}: means over the seeds; ratios to DeComFL",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    view.add_column("method")
    columns = (
        "rate",
        "up/round",
        "rounds",
        "of DeComFL's",
        "evaluations",
        "all bytes",
        "phones",
        "data c.",
        "final",
        "worst 10th",
    )
    for column in columns:
        view.add_column(column, justify="right")
    for method, found in done["methods"].items():
        runs, best = found["runs"], found["best"]
        rounds = figures(done, method, target, "rounds")
        spread = (
            "—" if rounds is None else f"{np.mean(rounds):.0f} ± {np.std(rounds, ddof=1) if len(rounds) > 1 else 0:.0f}"
        )
        view.add_row(
            method,
            f"{best['rate']:.3g} {best['schedule'][:3]}",
            f"{runs[0]['bytes_up_each']:,}",
            spread,
            _ratio(done, method, target, "rounds"),
            _ratio(done, method, target, "evaluations").split(" ")[0],
            _ratio(done, method, target, "bytes").split(" ")[0],
            _ratio(done, method, target, "seconds, phones").split(" ")[0],
            _ratio(done, method, target, "seconds, data centre").split(" ")[0],
            f"{np.mean([run['final'] for run in runs]):.3f}",
            "—" if runs[0]["worst_tenth"] is None else f"{np.mean([run['worst_tenth'] for run in runs]):.3f}",
        )
    return view


SHOWN = ("decomfl", "hiso", "shared 32 × float32", "mosaic 32 × 4", "mosaic 64 × 2", "fed_sgd")


def picture(done: dict[str, Any], path: Path) -> None:
    """Accuracy against bytes up and against evaluations, bands of one standard deviation over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    setting = done["setting"]
    every, cohort = int(setting["every"]), int(setting["cohort"])
    figure, panes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    costs = {
        "bytes up, all clients together": ("bytes_up_each", cohort),
        "evaluations by a client that comes every round": ("evaluations_each", 1),
    }
    for pane, (words, (cost, times)) in zip(panes, costs.items(), strict=True):
        for method in (name for name in SHOWN if name in done["methods"]):
            runs = done["methods"][method]["runs"]
            curves = np.array([run["curve"] for run in runs])[:, 1:]
            at = every * np.arange(1, curves.shape[1] + 1) * runs[0][cost] * times
            mean, spread = curves.mean(0), curves.std(0)
            line = pane.plot(at, mean, label=method)[0]
            pane.fill_between(at, mean - spread, mean + spread, color=line.get_color(), alpha=0.15, lw=0)
        for target in setting["targets"].split(","):
            pane.axhline(float(target), color="gray", lw=0.6, ls=":")
        pane.set(xscale="log", xlabel=words)
        pane.grid(alpha=0.3)
    panes[0].set_ylabel("test accuracy")
    panes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{setting['task']}: {setting['clients']} clients, {cohort} a round, {setting['seeds']} seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(done: dict[str, Any], path: Path, console: Console) -> None:
    """Print a table for every target, and draw."""
    wide = Console(width=170) if not console.is_terminal else console
    for target in done["setting"]["targets"].split(","):
        wide.print(table(done, target, path.stem))
    picture(done, path.with_suffix(".png"))
