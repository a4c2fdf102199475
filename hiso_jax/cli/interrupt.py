"""Ctrl-C and the signals of schedulers: the first ends a run after the dispatch in flight, the second at once.

SLURM and Kubernetes send SIGTERM before they kill a process; a lost terminal sends SIGHUP. The first process of a
container ignores SIGTERM unless it handles it.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# The signals received, the latest last. The list is global because signals are sent to the process.
_received: list[int] = []


class Terminated(KeyboardInterrupt):
    """A signal ends the command at once: no run was in progress, or it was the second signal."""


def exit_code() -> int:
    """128 plus the number of the signal that ended the command, as in shells."""
    return 128 + (_received[-1] if _received else signal.SIGINT)


def _raise(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    raise Terminated


@contextmanager
def heeding(handle: Callable[[int, FrameType | None], None] = _raise) -> Iterator[None]:
    """Handle the signals with ``handle`` inside the context; by default each raises :class:`Terminated`.

    A signal other than SIGINT that the process was started to ignore, as by ``nohup`` with SIGHUP, stays ignored.
    """
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    heeded = [
        number for number, handler in previous.items() if handler is not signal.SIG_IGN or number == signal.SIGINT
    ]
    for number in heeded:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, previous[number])


@contextmanager
def stop_on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Call ``stop`` at the first signal inside the context, and raise :class:`Terminated` at the second."""

    def handle(number: int, frame: FrameType | None) -> None:
        _received.append(number)
        for each in SIGNALS:
            if signal.getsignal(each) is handle:
                signal.signal(each, _raise)
        stop()

    with heeding(handle):
        yield
