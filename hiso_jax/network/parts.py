"""The parts of a run that server and clients make for themselves; code does not travel."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from hiso_jax import fed
from hiso_jax.experiment import Experiment
from hiso_jax.fed.algorithm import Algorithm, as_algorithm
from hiso_jax.fed.keys import init_key
from hiso_jax.fed.measure import Estimator
from hiso_jax.fed.run import completed
from hiso_jax.network.description import Forms, describe, forms_of


class Parts(NamedTuple):
    """The parts of a run.

    Attributes:
      task: the model, its loss and its metrics.
      algorithm: the method.
      config: the configuration, with the method's defaults.
      about: the options of the experiment; empty if the parts were made by a program.
    """

    task: Any
    algorithm: Algorithm
    config: fed.SimulationConfig
    about: Mapping[str, Any]

    @property
    def estimator(self) -> Estimator:
        """How clients measure."""
        return completed(self.task, self.algorithm, self.config)[1]

    def initial(self) -> PyTree:
        """The initial parameters."""
        return self.task.init(init_key(jax.random.key(self.config.seed)))

    def forms(self, params: PyTree) -> Forms:
        """The forms of the run's messages; only the shapes of ``params`` are read."""
        return forms_of(self.algorithm, self.estimator, params, self.config.cohort)

    def description(self, params: PyTree) -> bytes:
        """The run's description, packed."""
        return describe(self.about, self.algorithm, self.estimator, self.config, params)


def parts_of(experiment: Experiment) -> Parts:
    """The parts of an experiment."""
    return parts(experiment.task, experiment.algorithm, experiment.config, experiment.about)


def parts(task: Any, algorithm: Algorithm, config: fed.SimulationConfig, about: Mapping[str, Any] = {}) -> Parts:
    """The parts of a run that a program makes.

    Args:
      task: the model, its loss, its metrics and, on the server, its test examples.
      algorithm: the method, whose messages are scalars.
      config: the configuration.
      about: the options of its experiment, if it has them.
    """
    method = as_algorithm(algorithm)
    return Parts(task, method, completed(task, method, config)[0], about)
