"""The report of a run, in the directory of the run."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from hiso_jax import fed
from hiso_jax.reports.comparison import Compared
from hiso_jax.reports.directory import append_evaluation, append_samples, cut_samples, write_json, write_metrics
from hiso_jax.reports.figures import save_picture
from hiso_jax.reports.subject import Subject
from hiso_jax.reports.summary import Asked, run_summary


class Report(fed.Callback):
    """Writes a run's report beside its ledger: ``metrics.jsonl``, ``summary.json`` and ``curves.png``.

    ``metrics.jsonl`` gets a line per evaluation during the run; the other files are written at its end. A task that
    shows what its model does on test examples also gets ``samples.jsonl``, a line for each. The names of
    the task and the algorithm, and a ``learning_rate`` and a ``target``, come from the storage's ``about``. A run
    without a storage only gets :attr:`summary`. If there are several processes, one of them writes.

    Args:
      began: the ``time.perf_counter()`` from which ``wall_seconds`` is counted; None is when this object is made.

    Attributes:
      summary: the figures of ``summary.json``, once the run has ended.

    Example:
      >>> import tempfile, hiso_jax
      >>> from hiso_jax import fed, reports, tasks
      >>> task = tasks.digits()
      >>> population = fed.dirichlet(task.train["label"], 20, alpha=0.5)
      >>> config = fed.SimulationConfig(rounds=10, cohort=4, eval_every=5)
      >>> run = fed.Simulation(
      ...     task,
      ...     hiso_jax.hiso(1e-2),
      ...     population,
      ...     config,
      ...     storage=fed.Storage(tempfile.mkdtemp() + "/run", about={"algorithm": "hiso"}),
      ...     callbacks=[reports.Report()],
      ... )
      >>> result = run.run()
      >>> sorted(path.name for path in run.storage.folder.iterdir() if path.suffix)
      ['curves.png', 'ledger.hiso', 'metrics.jsonl', 'summary.json']
    """

    def __init__(self, began: float | None = None) -> None:
        """See the class."""
        self.summary: dict[str, Any] = {}
        self._began, self._began_at = time.perf_counter() if began is None else began, 0

    def begin(self, session: fed.Session) -> None:
        """Rewrite ``metrics.jsonl`` of a resumed run from the ledger: the file may lack lines, or a part of a line."""
        self._began_at = session.round
        folder = _folder(session)
        if folder is not None and session.storage is not None and session.storage.resume:
            write_metrics(folder, session.history)
            cut_samples(folder, session.history[-1].round if session.history else -1)

    def after(self, session: fed.Session, evaluation: fed.Evaluation | None) -> None:
        """Append a line to ``metrics.jsonl``, and the task's samples to ``samples.jsonl``."""
        folder = _folder(session)
        if folder is not None and evaluation is not None:
            append_evaluation(folder, evaluation)
            if session.samples:
                append_samples(folder, evaluation.round, session.samples)

    def end(self, session: fed.Session, result: fed.Result) -> None:
        """Write the report.

        Raises:
          OSError: the report cannot be written; the ledger has been written by then.
        """
        prepared, storage = session.prepared, session.storage
        task, about = prepared.task, {} if storage is None else storage.about
        name = str(about.get("task") or getattr(task, "name", type(task).__name__))
        metric = fed.metric_of(task, result.metrics[0].metrics)
        target = about.get("target", getattr(task, "target", None))
        algorithm = str(about.get("algorithm", "a method of its own"))
        clips = prepared.algorithm.description.get("rescale", [])
        rate, seed = about.get("learning_rate"), prepared.config.seed
        asked = Asked(name, algorithm, rate, seed, metric, target, _hostile(session), clips)
        self.summary = run_summary(asked, result, time.perf_counter() - self._began)
        folder = _folder(session)
        # If a finished run is resumed, its first report is kept, because its times are those of the run. A report of
        # fewer rounds is replaced: it remains if a run was interrupted, resumed, and killed after its last round.
        if folder is None or (self._began_at == result.rounds and _is_reported(folder, self.summary)):
            return
        write_json(folder / "summary.json", self.summary)
        write_metrics(folder, result.metrics)
        title = f"{name}, {algorithm}: {prepared.clients:,} clients, {prepared.config.answers} a round"
        done = Compared({"learning_rate": rate}, [self.summary], [list(result.metrics)])
        save_picture(Subject(title, {algorithm: done}, metric, target, None), folder / "curves.png", title)


def _folder(session: fed.Session) -> Path | None:
    """The directory that this process writes to, or None."""
    return None if session.storage is None or jax.process_index() != 0 else session.storage.folder


def _hostile(session: fed.Session) -> str | None:
    """A description of the hostile clients, or None."""
    prepared = session.prepared
    share, clients, cohort = prepared.config.attackers, prepared.clients, prepared.config.answers
    if not share:
        return None
    of = f"{round(share * cohort)} of every cohort of {cohort}"
    if prepared.config.attackers_of == "population":
        of = f"{round(share * clients):,} of {clients:,} clients"
    return f"{of}: {prepared.algorithm.description['attack'].split('.')[0]}"


def _is_reported(folder: Path, summary: Mapping[str, Any]) -> bool:
    """Whether the report in ``folder`` has the same rounds, the same kind of end and the same parameters."""
    try:
        written = json.loads((folder / "summary.json").read_text())
        return all(written[name] == summary[name] for name in ("rounds", "interrupted", "params_sha256"))
    except (OSError, ValueError, KeyError, TypeError):
        return False
