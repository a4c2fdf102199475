"""The console script: from its first line on Ctrl-C ends in one line, also in the seconds while JAX is imported."""

import os
import signal
from types import FrameType


def _end(number: int, frame: FrameType | None) -> None:
    # Nothing has begun that could be saved, and an exception would surface in the middle of an import.
    os.write(2, b"hiso-jax: interrupted\n")
    os._exit(128 + number)


def main() -> None:
    """Import the command, and run it; see :mod:`hiso_jax.cli.main`."""
    signal.signal(signal.SIGINT, _end)
    from hiso_jax.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
