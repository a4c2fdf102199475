"""``hiso-jax report`` and ``hiso-jax plot``: runs and comparisons as a page and as a figure."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console

from hiso_jax import tune
from hiso_jax.choices import Listed
from hiso_jax.cli import errors
from hiso_jax.cli.arguments import Positional
from hiso_jax.reports import AXES, human_bytes


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write a report of runs and comparisons: one HTML file with interactive charts, which needs no network.

    Attributes:
      paths: directories of runs or comparisons; runs of the same task are shown side by side.
      out: the file to write.
    """

    paths: Annotated[tuple[Path, ...], Positional]
    out: Path = Path("report.html")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw runs and comparisons as a figure for a paper: the metric that counts against what it cost.

    Attributes:
      paths: directories of runs or comparisons.
      out: the file to write, .pdf, .svg or .png.
      against: horizontal axes, a panel each: round, bytes_up, forward_passes, simulated_seconds.
      columns: width of the figure in columns of a paper.
    """

    paths: Annotated[tuple[Path, ...], Positional]
    out: Path = Path("figure.pdf")
    against: Annotated[tuple[str, ...], Listed(str, "A,B,…")] = ("round", "bytes_up", "forward_passes")
    columns: Literal[1, 2] = 2


def report(options: ReportOptions, console: Console) -> int:
    """Write the report, and return the exit code; see :func:`hiso_jax.tune.report`.

    Raises:
      UsageError: a path holds neither a run nor a comparison, or the file cannot be written.
    """
    with errors.refusing():
        file = tune.report(*options.paths, out=options.out)
    console.print(f"written to {file}, {human_bytes(file.stat().st_size)}", soft_wrap=True, highlight=False)
    return errors.DONE


def plot(options: Plot, console: Console) -> int:
    """Draw the figure, and return the exit code; see :func:`hiso_jax.tune.figure`.

    Raises:
      UsageError: a path holds neither a run nor a comparison, or the file cannot be written.
    """
    with errors.refusing():
        drawn = tune.figure(*options.paths, out=options.out, against=options.against, columns=options.columns)
    shown = {axis.get_xlabel() for axis in drawn.axes}
    left_out = [name for name in options.against if AXES[name] not in shown]
    if left_out:
        why = "proportional to the rounds for every method, so the panel would repeat theirs, or not recorded"
        console.print(f"left out: {', '.join(left_out)} ({why})", soft_wrap=True, highlight=False)
    console.print(f"written to {options.out}", soft_wrap=True, highlight=False)
    return errors.DONE
