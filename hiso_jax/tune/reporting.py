"""Reports and figures of runs and comparisons, for Python and for the command line."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hiso_jax import fed
from hiso_jax.checks import ParameterError
from hiso_jax.experiment import Single, command_of
from hiso_jax.fed.ledger import exists, write_file
from hiso_jax.paths import as_path
from hiso_jax.reports import (
    Subject,
    as_page,
    figure_of_subjects,
    read_subject,
    side_by_side,
    subject_of_result,
)
from hiso_jax.tune.results import Comparison
from hiso_jax.tune.settings import Compare

# File endings of figures.
FIGURES = (".pdf", ".svg", ".png")


def subject_of(shown: Any) -> Subject:
    """A run's or a comparison's directory, a :class:`Comparison` or a result, as the subject of a report.

    Raises:
      ParameterError: it is none of these, or a file of the directory was altered.
    """
    if isinstance(shown, Comparison):
        return shown.subject()
    if isinstance(shown, fed.Result):
        return subject_of_result(shown)
    found = read_subject(as_path("paths", shown))
    command, kind = ("run", Single) if found.baseline is None else ("compare", Compare)
    return replace(found, command=command_of(found.config, command, kind))


def _subjects(shown: Sequence[Any]) -> list[Subject]:
    if not shown:
        raise ParameterError("paths", "must be at least one run or comparison, got none")
    return side_by_side([subject_of(each) for each in shown])


def report(*shown: Any, out: Path | str) -> Path:
    """Write a report of runs and comparisons: one HTML file with interactive charts, which needs no network.

    This is ``hiso-jax report``. Runs of the same task are shown side by side; every comparison has a part of its own.

    Args:
      shown: directories of runs or comparisons, results of runs, or what :func:`compare` returned.
      out: the file to write, ending in .html; an earlier report of that name is replaced.

    Returns:
      The file.

    Raises:
      ParameterError: a directory holds neither a run nor a comparison, or was altered; or ``out`` cannot be written.

    Example:
      >>> import tempfile, hiso_jax
      >>> from hiso_jax import tune
      >>> folder = tempfile.mkdtemp()
      >>> numbers = dict(rounds=10, clients=10, cohort=2, perturbations=1, batch_size=4, eval_every=5)
      >>> result = hiso_jax.Experiment(algorithm="decomfl", **numbers).run(folder + "/run")
      >>> tune.report(folder + "/run", out=folder + "/report.html").name
      'report.html'
    """
    file = as_path("out", out)
    if file.suffix.lower() not in (".html", ".htm"):
        raise ParameterError("out", f"must be a file that ends in .html, got {file}")
    page = as_page(_subjects(shown))
    _write(file, page.encode())
    return file


def figure(
    *shown: Any,
    out: Path | str | None = None,
    against: Sequence[str] = ("round", "bytes_up", "forward_passes"),
    columns: int = 2,
) -> Any:
    """Draw runs and comparisons for a paper: the metric that counts against what it cost.

    This is ``hiso-jax plot``. The figure is matplotlib's, so it can be restyled before it is saved.

    Args:
      shown: directories of runs or comparisons, results of runs, or what :func:`compare` returned; all of one metric.
      out: the file to write, .pdf, .svg or .png; None writes none.
      against: the horizontal axes, a panel each: round, bytes_up, forward_passes, simulated_seconds.
      columns: the width of the figure, 1 or 2 columns of a paper (3.4 and 7 inches).

    Returns:
      The ``matplotlib.figure.Figure``.

    Raises:
      ParameterError: a directory holds neither a run nor a comparison, or was altered; or an argument is not valid.
    """
    file = None if out is None else as_path("out", out)
    if file is not None and file.suffix.lower() not in FIGURES:
        raise ParameterError("out", f"must be a file that ends in {', '.join(FIGURES)}, got {file}")
    drawn = figure_of_subjects(_subjects(shown), against, columns)
    if file is not None:
        try:
            drawn.savefig(file, dpi=200)
        except OSError as error:
            raise ParameterError("out", f"cannot be written: {file} ({error.strerror})") from error
    return drawn


def _write(file: Path, content: bytes) -> None:
    try:
        if exists(file) and not file.is_file():
            raise ParameterError("out", f"must be a file, {file} is a directory")
        write_file(file, content)
    except OSError as error:
        raise ParameterError("out", f"cannot be written: {file} ({error.strerror})") from error
