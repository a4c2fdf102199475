"""Live progress: a bar on a terminal, plain lines elsewhere; and a line for every step that takes a while."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from hiso_jax.cli.interrupt import stop_on_interrupt
from hiso_jax.experiment import Settings, build_task
from hiso_jax.reports import Progress, plain
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
        simulation.callbacks = (*simulation.callbacks, Progress(title, self.console, asked, terse=True))
        with stop_on_interrupt(simulation.stop):
            yield


def load_task(options: Settings, console: Console) -> Any:
    """Load the task, and show on ``console`` that it takes a while.

    Raises:
      ParameterError: the data or the model cannot be loaded, or do not belong together.
    """
    with working(console, f"loading {options.task}"):
        return build_task(options)
