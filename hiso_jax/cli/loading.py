"""Loading a task, and what to tell of its data."""

from typing import Any

from rich.console import Console

from hiso_jax.cli.progress import working
from hiso_jax.experiment import Settings, build_task
from hiso_jax.fed.population import AnyPopulation, VirtualPopulation
from hiso_jax.reports import plain


def load_task(options: Settings, console: Console) -> Any:
    """The task, while ``console`` shows that it takes a while.

    Raises:
      ParameterError: the data or the model cannot be had, or do not belong together.
    """
    with working(console, f"loading {options.task}"):
        return build_task(options)


def virtual_note(population: AnyPopulation) -> list[str]:
    """What to tell the user of virtual clients, if there are any."""
    if not isinstance(population, VirtualPopulation):
        return []
    fewest, most = population.sizes
    return [
        f"{population.num_clients:,} virtual clients: each draws its own {fewest} to {most} examples from the pool of "
        f"{len(population.pool):,}"
    ]


def notes(task: Any, population: AnyPopulation) -> list[str]:
    """What to tell the user of the data before a run."""
    words = getattr(task, "label_words", "")
    return [*virtual_note(population), *([f"labels: {plain(words)}"] if words else [])]
