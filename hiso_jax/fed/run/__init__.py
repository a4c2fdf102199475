"""Many rounds: what a run is asked for, its loop, and what it leaves behind."""

from hiso_jax.fed.run.config import SimulationConfig, at_least, positive
from hiso_jax.fed.run.evaluation import first_at_target, make_evaluate
from hiso_jax.fed.run.result import Progress, Result
from hiso_jax.fed.run.simulation import Simulation
from hiso_jax.fed.run.sweep import Best, SweepResult, sweep
from hiso_jax.fed.run.traffic import Traffic

__all__ = [
    "Best",
    "Progress",
    "Result",
    "Simulation",
    "SimulationConfig",
    "SweepResult",
    "Traffic",
    "at_least",
    "first_at_target",
    "make_evaluate",
    "positive",
    "sweep",
]
