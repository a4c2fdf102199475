"""Live progress: a bar on a terminal, plain lines elsewhere."""

import math
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from hiso_jax import fed
from hiso_jax.reports import human_bytes, human_seconds


class Display:
    """Shows the progress of one run; called with :class:`hiso_jax.fed.Progress` after every dispatch."""

    def __init__(self, console: Console, title: str, task: Any) -> None:
        """``title`` names the run of ``task``."""
        self.console, self.title, self._task = console, title, task
        self._loss, self._metric = math.nan, ""
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
            disable=not console.is_terminal,
            transient=False,
        )
        self._row = self._bar.add_task(title, total=None, figures="compiling …")

    def __enter__(self) -> Self:
        """Begin to show."""
        if not self.console.is_terminal:
            self.console.print(f"{self.title}: compiling …")
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Stop showing."""
        self._bar.stop()

    def __call__(self, progress: fed.Progress) -> None:
        """Take note of a dispatch."""
        if not math.isnan(progress.train_loss):
            self._loss = progress.train_loss
        if progress.evaluation:
            name = fed.metric_of(self._task, progress.evaluation.metrics).name
            self._metric = f"{name.replace('_', ' ')} {progress.evaluation.metrics[name]:.3f}"
        speed = progress.round / progress.seconds if progress.seconds else 0.0
        left = (progress.rounds - progress.round) / speed if speed else math.nan
        known = [self._metric]
        if progress.round:
            known = [f"loss {self._loss:.3f}", *known, f"{speed:.3g} rounds/s", human_bytes(progress.bytes_total)]
            known.append(f"ETA {human_seconds(left)}")
        figures = "  ".join(known)
        self._bar.update(self._row, completed=progress.round, total=progress.rounds, figures=figures)
        if progress.evaluation and not self.console.is_terminal:
            self.console.print(f"{self.title}: round {progress.round}/{progress.rounds}  {figures}", soft_wrap=True)
