"""The default rate of the clients' own steps, for runs of several local steps."""

from dataclasses import replace
from typing import Any

import optax

from hiso_jax.checks import ParameterError
from hiso_jax.fed.algorithm import Algorithm
from hiso_jax.fed.measure import Projections
from hiso_jax.fed.run.config import SimulationConfig
from hiso_jax.fed.task import Task

DEFAULT_LOCAL_RATE = 0.1
# η_l of projections by the name of a task, or by the kind of a language model.
LOCAL_RATES = {"digits": 0.6, "mnist": 0.02, "fashion-mnist": 0.02, "adapters": 0.03, "full": 1e-3}


def local_rate_of_projections(kind: str) -> float:
    """The default rate of projections for a task, by its name or the kind of its model."""
    return LOCAL_RATES.get(kind, DEFAULT_LOCAL_RATE)


def scaled(share: float, rate: Any) -> Any:
    """``share`` times a learning rate, a number or a schedule."""
    return (lambda count: share * rate(count)) if callable(rate) else share * rate


def with_local_rate(algorithm: Algorithm, config: SimulationConfig, task: Task) -> SimulationConfig:
    """The configuration with a rate of the clients' own steps, where several steps need one and none is given.

    It is that of the task for projections, and otherwise the method's share of the server's rate.

    Raises:
      ParameterError: the server's rate is not known, because it is inside an optimizer of optax.
    """
    steps, measure = config.local_steps or 1, algorithm.measure
    reads = measure is None or "local_learning_rate" in measure.reads
    if steps == 1 or not reads or config.local_learning_rate is not None:
        return config
    if isinstance(measure, Projections):
        rate: optax.ScalarOrSchedule = local_rate_of_projections(
            str(getattr(task, "kind", None) or getattr(task, "name", ""))
        )
    elif algorithm.recipe is not None:
        rate = scaled(algorithm.local_share, algorithm.recipe.learning_rate)
    else:
        raise ParameterError(
            "local_learning_rate",
            f"must be given for {steps} local steps: the rate inside an optimizer of optax is not known, and that of a "
            "method in hiso_jax.algorithms is, hiso_jax.algorithms.hiso(0.01) say",
        )
    return replace(config, local_learning_rate=rate)
