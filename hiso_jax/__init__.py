"""HiSo-JAX: scalar-only federated zeroth-order fine-tuning (HiSo, arXiv 2506.02370)."""

from hiso_jax import algorithms, channels, fed, zo
from hiso_jax.algorithms import mosaic
from hiso_jax.checks import ParameterError
from hiso_jax.experiment import Experiment
from hiso_jax.fed import Algorithm, Population, Result, SimulationConfig, Task, make_round, replay
from hiso_jax.simulation import Simulation
from hiso_jax.zo import LowRank, binomial, decomfl, gaussian, hiso, rademacher, scale_by_hiso, scale_by_zo, sphere

__all__ = [
    "Algorithm",
    "Experiment",
    "LowRank",
    "ParameterError",
    "Population",
    "Result",
    "Simulation",
    "SimulationConfig",
    "Task",
    "algorithms",
    "binomial",
    "channels",
    "decomfl",
    "fed",
    "gaussian",
    "hiso",
    "make_round",
    "mosaic",
    "rademacher",
    "replay",
    "scale_by_hiso",
    "scale_by_zo",
    "sphere",
    "zo",
]
