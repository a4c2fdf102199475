"""Live progress: a bar on a terminal, plain lines elsewhere; and a line for every step that takes a while."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from hiso_jax import tune
from hiso_jax.cli.interrupt import stop_on_interrupt
from hiso_jax.experiment import Settings, build_task
from hiso_jax.reports import plain

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


class StudyProgress(tune.Progress):
    """Shows a study; the first signal ends it after the evaluation or the dispatch in flight."""

    @contextmanager
    def searching(self, title: str, rounds: int) -> Iterator[tune.Step]:
        """See :class:`tune.Progress`."""
        stopped: list[bool] = []
        with stop_on_interrupt(lambda: stopped.append(True)), super().searching(title, rounds) as step:
            yield lambda done, total: step(done, total) or bool(stopped)

    @contextmanager
    def running(self, title: str, simulation: Any, asked: str) -> Iterator[None]:
        """See :class:`tune.Progress`."""
        with stop_on_interrupt(simulation.stop), super().running(title, simulation, asked):
            yield


def load_task(options: Settings, console: Console) -> Any:
    """Load the task, and show on ``console`` that it takes a while.

    Raises:
      ParameterError: the data or the model cannot be loaded, or do not belong together.
    """
    with working(console, f"loading {options.task}"):
        return build_task(options)
