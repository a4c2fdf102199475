"""The console script: from its first line on Ctrl-C ends in one line, also in the seconds while JAX is imported."""

import os
import signal
import sys
from types import FrameType


def _end(number: int, frame: FrameType | None) -> None:
    # Nothing has begun that could be saved, and an exception would surface in the middle of an import.
    os.write(2, b"hiso-jax: interrupted\n")
    os._exit(128 + number)


def main() -> None:
    """Import the command, and run it; see :mod:`hiso_jax.cli.main`."""
    signal.signal(signal.SIGINT, _end)
    try:
        from hiso_jax.cli.main import main as command
    except (ValueError, AttributeError) as error:
        # JAX reads its settings from the environment as it is imported.
        named = sorted(name for name in os.environ if name.startswith("JAX_"))
        if not named:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        sys.exit(_refused(f"JAX does not take its settings, {', '.join(named)}: {reason}"))
    command()


def _refused(sentence: str) -> int:
    print(f"hiso-jax: error: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
