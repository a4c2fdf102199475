"""Live progress: a bar on a terminal, plain lines elsewhere."""

import math
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from hiso_jax import fed

UNITS = ("B", "kB", "MB", "GB", "TB")


def human_bytes(count: float) -> str:
    """``count`` bytes in decimal units, three significant digits."""
    power = 0
    while count >= 1000 and power < len(UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.0f} {UNITS[power]}" if power == 0 else f"{count:.3g} {UNITS[power]}"


def human_count(count: float) -> str:
    """``count`` with a unit of thousands, three significant digits."""
    return human_bytes(count).removesuffix("B").replace(" ", "")


def human_seconds(seconds: float) -> str:
    """``seconds`` as h:mm:ss, or as seconds below a minute."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole >= 172_800:
        return f"{seconds / 86_400:.3g} days"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


class Display:
    """Shows the progress of one run; called with :class:`hiso_jax.fed.Progress` after every dispatch."""

    def __init__(self, console: Console, title: str) -> None:
        """``title`` names the run."""
        self.console, self.title = console, title
        self._loss = self._accuracy = math.nan
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
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
            self._accuracy = progress.evaluation.metrics["accuracy"]
        speed = progress.round / progress.seconds if progress.seconds else 0.0
        left = (progress.rounds - progress.round) / speed if speed else math.nan
        known = [f"accuracy {self._accuracy:.3f}"]
        if progress.round:
            known = [f"loss {self._loss:.3f}", *known, f"{speed:.3g} rounds/s", human_bytes(progress.bytes_total)]
            known.append(f"ETA {human_seconds(left)}")
        figures = "  ".join(known)
        self._bar.update(self._row, completed=progress.round, total=progress.rounds, figures=figures)
        if progress.evaluation and not self.console.is_terminal:
            self.console.print(f"{self.title}: round {progress.round}/{progress.rounds}  {figures}", soft_wrap=True)
