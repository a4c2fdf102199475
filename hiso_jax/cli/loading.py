"""Loading a task."""

from typing import Any

from rich.console import Console

from hiso_jax.cli.progress import working
from hiso_jax.experiment import Settings, build_task


def load_task(options: Settings, console: Console) -> Any:
    """Load the task, and show on ``console`` that it takes a while.

    Raises:
      ParameterError: the data or the model cannot be loaded, or do not belong together.
    """
    with working(console, f"loading {options.task}"):
        return build_task(options)
