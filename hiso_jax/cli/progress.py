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
from hiso_jax.reports import human_bytes, human_seconds, plain
from hiso_jax.tune import Step, Watcher

# Seconds; what takes less needs no line.
SOON = 1.0


@contextmanager
def working(console: Console, what: str) -> Iterator[None]:
    """Say what is going on, and how long it took."""
    begin = time.perf_counter()
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Bar(*columns, console=console, transient=True) as bar:
            bar.add_task(plain(what), total=None)
            yield
    else:
        # Not at once: what is refused at once needs no line before.
        line = Timer(SOON, lambda: console.print(f"{plain(what)} …", soft_wrap=True, highlight=False))
        line.start()
        try:
            yield
        finally:
            line.cancel()
    seconds = time.perf_counter() - begin
    if seconds >= SOON:
        console.print(f"{plain(what)}: {seconds:.0f} s", soft_wrap=True, highlight=False)


class Display:
    """Shows the progress of one run; called with :class:`hiso_jax.fed.Progress` after every dispatch."""

    def __init__(self, console: Console, title: str, task: Any, asked: str = "", *, terse: bool = False) -> None:
        """``title`` names the run of ``task``; ``asked`` is what to say of it before its first round.

        One of many runs is ``terse``: where lines are printed, only its last evaluation is one.
        """
        self._terse = terse
        self.console, self.title, self._task, self._asked = console, plain(title), task, asked
        self._loss, self._metric = math.nan, ""
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
        """Begin to show."""
        if not self.console.is_terminal:
            self.console.print(f"{self.title}: compiling …")
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Stop showing."""
        self._bar.stop()

    def _say_what_follows(self, progress: fed.Progress) -> None:
        if progress.round == progress.rounds:
            self.console.print(f"{self.title}: all {progress.round:,} rounds are done", highlight=False)
            return
        said = [f"compiled in {progress.session.compile_seconds:.0f} s", *([self._asked] if self._asked else [])]
        if progress.expected_seconds is not None:
            left = progress.rounds - progress.round
            said.append(f"{left:,} rounds take about {human_seconds(max(1.0, progress.expected_seconds))}")
        self.console.print(f"{self.title}: {', '.join(said)}", soft_wrap=True, highlight=False)

    def __call__(self, progress: fed.Progress) -> None:
        """Take note of a dispatch."""
        if not progress.session.is_told:
            self._say_what_follows(progress)
        if not math.isnan(progress.train_loss):
            self._loss = progress.train_loss
        if progress.evaluation:
            name = fed.metric_of(self._task, progress.evaluation.metrics).name
            self._metric = f"{name.replace('_', ' ')} {progress.evaluation.metrics[name]:.3f}"
        speed = progress.round / progress.seconds if progress.seconds else 0.0
        known = [self._metric]
        if progress.round:
            known = [f"loss {self._loss:.3f}", *known, f"{speed:.3g} rounds/s", human_bytes(progress.bytes_total)]
            known.append(f"ETA {human_seconds(progress.expected_seconds or 0.0)}")
        figures = "  ".join(known)
        self._bar.update(self._row, completed=progress.round, total=progress.rounds, figures=figures)
        told = progress.round == progress.rounds or not self._terse
        if progress.evaluation and told and not self.console.is_terminal:
            self.console.print(f"{self.title}: round {progress.round}/{progress.rounds}  {figures}", soft_wrap=True)


class ConsoleWatcher(Watcher):
    """Shows a study on a console; the first signal ends it after the evaluation or the dispatch in flight."""

    def __init__(self, console: Console) -> None:
        """``console`` is where it is shown."""
        self.console = console

    def say(self, sentence: str) -> None:
        """A line."""
        self.console.print(sentence, soft_wrap=True, highlight=False)

    @contextmanager
    def searching(self, title: str, rounds: int) -> Iterator[Step]:
        """A bar, or a line where there is no terminal."""
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
        """The progress of one run of many."""
        display = Display(self.console, title, simulation.task, asked, terse=True)
        simulation.callbacks = (display,)
        with display, stop_on_interrupt(simulation.stop):
            yield
