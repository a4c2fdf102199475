"""Ctrl-C and what schedulers send: the first signal ends a run after the dispatch in flight, the second at once.

SLURM and Kubernetes send SIGTERM before they kill, a lost terminal SIGHUP. As the first process of a container, SIGTERM
is ignored unless it is handled.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# The one that came last; that a process got one is a fact of the process.
_received: list[int] = []


class Terminated(KeyboardInterrupt):
    """A signal arrived while there was nothing to stop at the end of."""


def exit_code() -> int:
    """128 and the number of the signal that ended the command, as shells have it."""
    return 128 + (_received[-1] if _received else signal.SIGINT)


def _raise(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    raise Terminated


@contextmanager
def heeding(handle: Callable[[int, FrameType | None], None] = _raise) -> Iterator[None]:
    """While inside, the signals are handled so; by default each raises :class:`Terminated`.

    A signal that whoever started the process had it ignore, as ``nohup`` does with SIGHUP, stays ignored.
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
    """While inside, the first signal calls ``stop`` and the second raises :class:`Terminated`."""

    def handle(number: int, frame: FrameType | None) -> None:
        _received.append(number)
        for each in SIGNALS:
            if signal.getsignal(each) is handle:
                signal.signal(each, _raise)
        stop()

    with heeding(handle):
        yield
