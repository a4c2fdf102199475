"""Notifications of a study's progress, and their display."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from hiso_jax import reports

Step = Callable[[int, int], bool]
"""(rounds done, rounds) → whether to stop."""


class Watcher:
    """Follows a study. This class is silent and never stops the study; subclasses show progress, and may stop it."""

    def say(self, sentence: str) -> None:
        """Receive a sentence about a result or a finished step."""

    @contextmanager
    def searching(self, title: str, rounds: int) -> Iterator[Step]:
        """The context of settings tried side by side; the yielded :data:`Step` is called after each evaluation."""
        yield lambda done, total: False

    @contextmanager
    def running(self, title: str, simulation: Any, asked: str) -> Iterator[None]:
        """The context of one run; ``asked`` names its rate and schedule."""
        yield


class Progress(Watcher):
    """Shows the progress of a study, as the command line does: bars in a terminal or a notebook, lines elsewhere.

    Args:
      console: where it is shown; by default the standard output.

    Example:
      >>> from hiso_jax import tune
      >>> numbers = dict(rounds=10, clients=10, cohort=2, perturbations=1, batch_size=4, eval_every=5)
      >>> swept = tune.sweep(["decomfl"], learning_rate=[0.01], watcher=tune.Progress(), **numbers)
      digits decomfl: 1 setting of 10 rounds, constant rate: compiling …
    """

    def __init__(self, console: Console | None = None) -> None:
        """See the class."""
        self.console = console or Console()

    @property
    def _has_bar(self) -> bool:
        return self.console.is_terminal or self.console.is_jupyter

    def say(self, sentence: str) -> None:
        """Print a line."""
        self.console.print(sentence, soft_wrap=True, highlight=False)

    @contextmanager
    def searching(self, title: str, rounds: int) -> Iterator[Step]:
        """Show a bar, or a line where there is no terminal."""

        def step(done: int, total: int) -> bool:
            bar.update(row, completed=done, total=total)
            return False

        if not self._has_bar:
            self.say(f"{reports.plain(title)}: compiling …")
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn())
        with Bar(*columns, console=self.console, disable=not self._has_bar, transient=True) as bar:
            row = bar.add_task(reports.plain(title), total=rounds)
            yield step

    @contextmanager
    def running(self, title: str, simulation: Any, asked: str) -> Iterator[None]:
        """Show the progress of one run of many."""
        shown = reports.Progress(title, self.console, asked, terse=True)
        simulation.callbacks = (*simulation.callbacks, shown)
        yield
