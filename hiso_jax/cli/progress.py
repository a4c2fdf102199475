"""Live progress: a bar on a terminal, plain lines elsewhere; and a line for every step that takes a while."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from hiso_jax import fed
from hiso_jax.cli.interrupt import stop_on_interrupt
from hiso_jax.experiment import Settings, build_task
from hiso_jax.reports import human_bytes, human_seconds, plain
from hiso_jax.tune import Step, Watcher

# Seconds; a shorter step needs no line.
SOON = 1.0


@contextmanager
def working(console: Console, what: str) -> Iterator[None]:
    """Show the name of a step while it runs, and how long it took."""
    begin = time.perf_counter()
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Bar(*columns, console=console, transient=True) as bar:
            bar.add_task(plain(what), total=None)
            yield
    else:
        # Delayed: an error that comes at once needs no line before it.
        line = Timer(SOON, lambda: console.print(f"{plain(what)} …", soft_wrap=True, highlight=False))
        line.start()
        try:
            yield
        finally:
            line.cancel()
    seconds = time.perf_counter() - begin
    if seconds >= SOON:
        console.print(f"{plain(what)}: {seconds:.0f} s", soft_wrap=True, highlight=False)


class Display(fed.Callback):
    """Shows the progress of one run."""

    def __init__(self, console: Console, title: str, task: Any, asked: str = "", *, terse: bool = False) -> None:
        """``title`` names the run of ``task``; ``asked`` is a clause about its settings, shown before its first round.

        ``terse`` is for one of many runs: where lines are printed, only its last evaluation gets a line.
        """
        self._terse = terse
        self.console, self.title, self._task, self._asked = console, plain(title), task, asked
        self._loss, self._metric, self._is_announced = math.nan, "", False
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=False,
        )
        self._row = self._bar.add_task(self.title, total=None, figures="compiling …")

    def __enter__(self) -> Self:
        """Start the display."""
        if not self.console.is_terminal:
            self.console.print(f"{self.title}: compiling …")
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
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
            name = fed.metric_of(self._task, evaluation.metrics).name
            self._metric = f"{name.replace('_', ' ')} {evaluation.metrics[name]:.3f}"
        speed = session.round / session.seconds if session.seconds else 0.0
        known = [self._metric]
        if session.round:
            known = [f"loss {self._loss:.3f}", *known, f"{speed:.3g} rounds/s", human_bytes(session.bytes_total)]
            known.append(f"ETA {human_seconds(session.expected_seconds or 0.0)}")
        figures = "  ".join(known)
        self._bar.update(self._row, completed=session.round, total=session.rounds, figures=figures)
        shown = session.round == session.rounds or not self._terse
        if evaluation and shown and not self.console.is_terminal:
            self.console.print(f"{self.title}: round {session.round}/{session.rounds}  {figures}", soft_wrap=True)


class ConsoleWatcher(Watcher):
    """Shows a study on a console; the first signal ends it after the evaluation or the dispatch in flight."""

    def __init__(self, console: Console) -> None:
        """``console`` is where the study is shown."""
        self.console = console

    def say(self, sentence: str) -> None:
        """Print a line."""
        self.console.print(sentence, soft_wrap=True, highlight=False)

    @contextmanager
    def searching(self, title: str, rounds: int) -> Iterator[Step]:
        """Show a bar, or a line where there is no terminal."""
        stopped: list[bool] = []

        def step(done: int, total: int) -> bool:
            bar.update(row, completed=done, total=total)
            return bool(stopped)

        if not self.console.is_terminal:
            self.say(f"{plain(title)}: compiling …")
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn())
        bars = Bar(*columns, console=self.console, disable=not self.console.is_terminal, transient=True)
        with stop_on_interrupt(lambda: stopped.append(True)), bars as bar:
            row = bar.add_task(plain(title), total=rounds)
            yield step

    @contextmanager
    def running(self, title: str, simulation: Any, asked: str) -> Iterator[None]:
        """Show the progress of one run of many."""
        display = Display(self.console, title, simulation.task, asked, terse=True)
        simulation.callbacks = (*simulation.callbacks, display)
        with display, stop_on_interrupt(simulation.stop):
            yield


def load_task(options: Settings, console: Console) -> Any:
    """Load the task, and show on ``console`` that it takes a while.

    Raises:
      ParameterError: the data or the model cannot be loaded, or do not belong together.
    """
    with working(console, f"loading {options.task}"):
        return build_task(options)
