"""Ctrl-C in a program that does not handle it: the first ends a run or a sweep, the second the program."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger("hiso_jax")

# A Ctrl-C within so many seconds of another ends the program, also if the other was in an earlier run of a loop.
AGAIN_SECONDS = 5.0
_interrupted_at = -AGAIN_SECONDS


@contextmanager
def stopped_by_interrupt(what: str, stop: Callable[[], None]) -> Iterator[None]:
    """Call ``stop`` at the first Ctrl-C, unless the program or another thread handles it; the second ends the program.

    A loop of runs goes on with the next one after the first, so the second may come in another run.

    Args:
      what: a clause for the log: what ends, and when.
      stop: asks for the end.
    """
    alone = threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        global _interrupted_at
        signal.signal(signal.SIGINT, signal.default_int_handler)
        before, _interrupted_at = _interrupted_at, time.monotonic()
        if _interrupted_at - before < AGAIN_SECONDS:
            raise KeyboardInterrupt
        logger.warning("interrupted: %s; Ctrl-C again within %g seconds ends the program", what, AGAIN_SECONDS)
        stop()

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
