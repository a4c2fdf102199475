"""A federated run whose directory tells what it was, from Python as from the command line."""

import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax

from hiso_jax import fed


class Simulation(fed.Simulation):
    """A federated run, see :class:`hiso_jax.fed.Simulation`, that leaves a report where it is kept.

    With a ``storage`` its directory also gets ``metrics.jsonl``, a line an evaluation while it goes, and at the end
    ``summary.json`` and ``curves.png``. What is to be called ``task`` and ``algorithm`` there, and a ``learning_rate``
    and ``target`` to tell, are entries of ``storage.about``.

    Attributes:
      summary: the figures of the run, once it has ended; empty without a storage.
      began: when what the run belongs to began, of ``time.perf_counter``, if that was before :meth:`run`.

    Example:
      >>> import tempfile, hiso_jax
      >>> from hiso_jax import fed, tasks
      >>> task = tasks.digits()
      >>> population = fed.dirichlet(task.train["label"], 20, alpha=0.5)
      >>> config = fed.SimulationConfig(rounds=10, cohort=4, eval_every=5)
      >>> storage = fed.Storage(tempfile.mkdtemp() + "/run", about={"algorithm": "hiso"})
      >>> result = hiso_jax.Simulation(task, hiso_jax.hiso(1e-2), population, config, storage=storage).run()
      >>> sorted(path.name for path in storage.folder.iterdir() if path.suffix)
      ['curves.png', 'ledger.hiso', 'metrics.jsonl', 'summary.json']
    """

    summary: dict[str, Any]
    began: float | None = None

    def run(self) -> fed.Result:
        """Run, as :meth:`hiso_jax.fed.Simulation.run` does, and write the report.

        Raises:
          ValueError: as there.
          OSError: as there, or the report cannot be written; the ledger is then.
        """
        self.summary, self._begun_at = {}, 0
        if self.storage is None:
            return super().run()
        from hiso_jax.reports import append_evaluation

        begin = time.perf_counter() if self.began is None else self.began
        own, folder = self.callbacks, self.storage.folder
        if jax.process_index() == 0:
            again = (self._write_earlier,) if self.storage.resume else ()
            self.callbacks = (*again, partial(append_evaluation, folder), *own)
        try:
            result = super().run()
        finally:
            self.callbacks = own
        if jax.process_index() == 0:
            self._report(result, time.perf_counter() - begin)
        return result

    def _write_earlier(self, progress: fed.Progress) -> None:
        """Write the ledger's evaluations once: their file may have lost some, or half a line."""
        assert self.storage is not None
        if not progress.session.is_told:
            self._begun_at = progress.round
            from hiso_jax.reports import write_metrics

            rows = [row for row in progress.session.history if row is not progress.evaluation]
            write_metrics(self.storage.folder, rows)

    def _hostile(self) -> str | None:
        """Who was hostile, in words."""
        share, clients, cohort = self.config.attackers, self.population.num_clients, self.config.cohort
        if not share:
            return None
        of = f"{round(share * cohort)} of every cohort of {cohort}"
        if self.config.attackers_of == "population":
            of = f"{round(share * clients):,} of {clients:,} clients"
        return f"{of}: {self.algorithm.description['attack'].split('.')[0]}"

    def _report(self, result: fed.Result, seconds: float) -> None:
        # Imported where they are needed: they bring terminals and pictures with them.
        from hiso_jax.reports import Asked, curves, run_summary, write_json, write_metrics

        assert self.storage is not None
        about, folder = self.storage.about, self.storage.folder
        name = str(about.get("task") or getattr(self.task, "name", type(self.task).__name__))
        metric = fed.metric_of(self.task, result.metrics[0].metrics)
        target = about.get("target", getattr(self.task, "target", None))
        algorithm = str(about.get("algorithm", "a method of its own"))
        hostile = self._hostile()
        asked = Asked(name, algorithm, about.get("learning_rate"), self.config.seed, metric, target, hostile)
        self.summary = run_summary(asked, result, seconds)
        # A run that was over adds nothing, and its first report knows more of how long it took. A report of fewer
        # rounds stays behind where a run was interrupted, went on, and was killed after its last round.
        if self._begun_at == result.rounds and _is_reported(folder, self.summary):
            return
        write_json(folder / "summary.json", self.summary)
        write_metrics(folder, result.metrics)
        title = f"{name}, {algorithm}: {self.population.num_clients:,} clients, {self.config.cohort} a round"
        curves({algorithm: [result.metrics]}, folder / "curves.png", title=title, metric=metric, target=target)


def _is_reported(folder: Path, summary: Mapping[str, Any]) -> bool:
    """Whether the report in ``folder`` is of the same rounds, ended alike and with the same parameters."""
    try:
        written = json.loads((folder / "summary.json").read_text())
        return all(written[name] == summary[name] for name in ("rounds", "interrupted", "params_sha256"))
    except (OSError, ValueError, KeyError, TypeError):
        return False
