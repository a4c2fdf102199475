"""HiSo-JAX: scalar-only federated zeroth-order fine-tuning (HiSo, arXiv 2506.02370)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hiso_jax import algorithms, channels, fed, zo
from hiso_jax.algorithms import mosaic
from hiso_jax.checks import ParameterError
from hiso_jax.fed import Algorithm, Population, Result, Simulation, SimulationConfig, Task, make_round, replay
from hiso_jax.renamed import successor
from hiso_jax.zo import LowRank, binomial, decomfl, gaussian, hiso, rademacher, scale_by_hiso, scale_by_zo, sphere

if TYPE_CHECKING:
    from hiso_jax import tune
    from hiso_jax.experiment import Experiment
    from hiso_jax.reports import Progress as progress

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
    "progress",
    "rademacher",
    "replay",
    "scale_by_hiso",
    "scale_by_zo",
    "sphere",
    "tune",
    "zo",
]


# What a notebook shows of a result.
Result.html = staticmethod(lambda result: import_module("hiso_jax.reports").result_as_html(result))


def __getattr__(name: str) -> Any:
    """Import what imports models, tables and pictures at its first use."""
    if name == "progress":
        return import_module("hiso_jax.reports").Progress
    if name in algorithms.ALGORITHMS.factories:
        return getattr(algorithms, name)
    if name == "tune":
        return import_module("hiso_jax.tune")
    if name == "Experiment":
        return import_module("hiso_jax.experiment").Experiment
    raise successor(__name__, name)
