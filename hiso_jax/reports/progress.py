"""The progress of a run in a terminal, a notebook or a file of lines."""

import math

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from hiso_jax import fed
from hiso_jax.reports.text import human_bytes, human_seconds, plain


class Progress(fed.Callback):
    """Shows the progress of a run: a bar in a terminal or a notebook, lines elsewhere; and a line while it compiles.

    Args:
      title: the name of the run.
      console: where it is shown; by default the standard output.
      asked: a clause about the run's settings, shown before its first round.
      terse: for one of many runs: where lines are printed, only its last evaluation gets a line.

    Example:
      >>> import hiso_jax
      >>> from hiso_jax import fed, tasks
      >>> task = tasks.digits()
      >>> population = fed.dirichlet(task.train["label"], 20, alpha=0.5)
      >>> config = fed.SimulationConfig(rounds=10, cohort=4, eval_every=5)
      >>> callbacks = [hiso_jax.progress()]
      >>> simulation = fed.Simulation(task, hiso_jax.hiso(1e-2), population, config, callbacks=callbacks)
      >>> result = simulation.run()  # doctest: +ELLIPSIS
      run: compiling …
      ...
    """

    def __init__(
        self, title: str = "run", console: Console | None = None, asked: str = "", *, terse: bool = False
    ) -> None:
        """See the class."""
        self.console, self.title, self._asked, self._terse = console or Console(), plain(title), asked, terse
        self._loss, self._metric, self._is_announced = math.nan, "", False
        self._has_bar = self.console.is_terminal or self.console.is_jupyter
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self._has_bar,
            transient=False,
        )
        self._row = self._bar.add_task(self.title, total=None, figures="compiling …")

    def open(self) -> None:
        """Start the display."""
        if not self._has_bar:
            self.console.print(f"{self.title}: compiling …")
        self._bar.start()

    def close(self) -> None:
        """Stop the display."""
        self._bar.stop()

    def begin(self, session: fed.Session) -> None:
        """Announce a resumed run; a new run is announced at its first evaluation, when its time can be estimated."""
        self._is_announced = session.round > 0
        self._bar.update(self._row, completed=session.round, total=session.rounds, figures="")
        if session.round == session.rounds:
            self.console.print(f"{self.title}: all {session.round:,} rounds are done", highlight=False)
        elif self._is_announced:
            self._announce(session)

    def _announce(self, session: fed.Session) -> None:
        said = [f"compiled in {session.compile_seconds:.0f} s", *([self._asked] if self._asked else [])]
        if session.expected_seconds is not None:
            left = session.rounds - session.round
            said.append(f"{left:,} rounds take about {human_seconds(max(1.0, session.expected_seconds))}")
        self.console.print(f"{self.title}: {', '.join(said)}", soft_wrap=True, highlight=False)

    def after(self, session: fed.Session, evaluation: fed.Evaluation | None) -> None:
        """Show how far the run is."""
        if not self._is_announced:
            self._announce(session)
            self._is_announced = True
        if not math.isnan(session.train_loss):
            self._loss = session.train_loss
        if evaluation:
            name = fed.metric_of(session.prepared.task, evaluation.metrics).name
            self._metric = f"{name.replace('_', ' ')} {evaluation.metrics[name]:.3f}"
        speed = session.round / session.seconds if session.seconds else 0.0
        known = [self._metric]
        if session.round:
            known = [
                f"loss {self._loss:.3f}",
                *known,
                f"{speed:.3g} rounds/s",
                f"{human_bytes(session.bytes_total)} sent",
            ]
            known.append(f"ETA {human_seconds(session.expected_seconds or 0.0)}")
        figures = "  ".join(known)
        self._bar.update(self._row, completed=session.round, total=session.rounds, figures=figures)
        shown = session.round == session.rounds or not self._terse
        if evaluation and shown and not self._has_bar:
            self.console.print(f"{self.title}: round {session.round}/{session.rounds}  {figures}", soft_wrap=True)
