"""What a study tells of as it goes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Step = Callable[[int, int], bool]
"""(rounds done, rounds) → whether to stop."""


class Watcher:
    """Hears what a study does. This one is silent and never stops it; subclasses show progress, and may stop it."""

    def say(self, sentence: str) -> None:
        """Hear a sentence about what was found or done."""

    @contextmanager
    def searching(self, title: str, rounds: int) -> Iterator[Step]:
        """While settings are tried side by side; what it yields is called after each evaluation."""
        yield lambda done, total: False

    @contextmanager
    def running(self, title: str, simulation: Any, asked: str) -> Iterator[None]:
        """While one run goes on; ``asked`` says its rate and schedule."""
        yield
