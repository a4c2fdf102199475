"""Tuning: grids, searches and comparisons of methods, for Python and for the command line."""

from hiso_jax.tune.comparison import compare, run_comparison
from hiso_jax.tune.directory import CONFIG
from hiso_jax.tune.reporting import figure, report
from hiso_jax.tune.results import Comparison, Swept
from hiso_jax.tune.settings import Compare, Study, Sweep
from hiso_jax.tune.sweeping import find_rate, run_sweep, sweep
from hiso_jax.tune.watcher import Progress, Step, Watcher

__all__ = [
    "CONFIG",
    "Compare",
    "Comparison",
    "Progress",
    "Step",
    "Study",
    "Sweep",
    "Swept",
    "Watcher",
    "compare",
    "figure",
    "find_rate",
    "report",
    "run_comparison",
    "run_sweep",
    "sweep",
]
