"""Notifications of a study's progress."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
