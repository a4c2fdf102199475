"""The parts of a run that server and clients make for themselves; code does not travel."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from hiso_jax import fed
from hiso_jax.checks import ParameterError, fraction
from hiso_jax.experiment import Experiment
from hiso_jax.fed.algorithm import Algorithm, as_algorithm
from hiso_jax.fed.keys import init_key
from hiso_jax.fed.measure import Estimator
from hiso_jax.fed.run import completed
from hiso_jax.fed.task import frozen_of, mean_metrics
from hiso_jax.network.description import Forms, describe, forms_of


class Parts(NamedTuple):
    """The parts of a run.

    Attributes:
      task: the model, its loss and its metrics.
      algorithm: the method.
      config: the configuration, with the method's defaults.
      about: the options of the experiment; empty if the parts were made by a program.
      held_out: the share of its examples that every client keeps for evaluation; 0 leaves evaluation to the server.
    """

    task: Any
    algorithm: Algorithm
    config: fed.SimulationConfig
    about: Mapping[str, Any]
    held_out: float = 0.0

    @property
    def estimator(self) -> Estimator:
        """How clients measure."""
        return completed(self.task, self.algorithm, self.config)[1]

    def initial(self) -> PyTree:
        """The initial parameters."""
        return self.task.init(init_key(jax.random.key(self.config.seed)))

    def metric_names(self, params: PyTree) -> list[str]:
        """The names of the metrics whose sums clients send, in their order; only the shapes of ``params`` are read."""
        batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), self.task.train)
        # Frozen parameters are arguments: they may be arrays of NumPy, which a trace cannot index.
        frozen = frozen_of(self.task)
        shapes = jax.eval_shape(self.task.metrics, params, batch, *([] if frozen is None else [frozen]))
        return list(mean_metrics(self.task, shapes))

    def forms(self, params: PyTree) -> Forms:
        """The forms of the run's messages; only the shapes of ``params`` are read."""
        buffered = self.config.buffer is not None
        return forms_of(self.algorithm, self.estimator, params, self.config.answers, buffered=buffered)

    def description(self, params: PyTree) -> bytes:
        """The run's description, packed."""
        return describe(self.about, self.algorithm, self.estimator, self.config, params, self.held_out)


def parts_of(experiment: Experiment, held_out: float = 0.0) -> Parts:
    """The parts of an experiment; see :func:`parts` for the rest."""
    return parts(experiment.task, experiment.algorithm, experiment.config, experiment.about, held_out)


def parts(
    task: Any,
    algorithm: Algorithm,
    config: fed.SimulationConfig,
    about: Mapping[str, Any] = {},
    held_out: float = 0.0,
) -> Parts:
    """The parts of a run that a program makes.

    Args:
      task: the model, its loss, its metrics and, on the server, its test examples.
      algorithm: the method, whose messages are scalars.
      config: the configuration.
      about: the options of its experiment, if it has them.
      held_out: the share of its examples that every client keeps for evaluation, 0 ≤ share < 1.

    Raises:
      ParameterError: ``held_out`` is out of range, or its metrics would not be sums of examples.
    """
    method = as_algorithm(algorithm)
    fraction("held_out", held_out)
    if held_out and method.needs_secret:
        raise ParameterError("held_out", "must be 0 in a private run: the metrics of clients are not noised")
    if held_out and getattr(task, "summarise", None) is not None:
        means, metric = getattr(task, "mean_metrics", ()), getattr(task, "metric", None)
        if not means or (metric is not None and metric not in means):
            raise ParameterError(
                "held_out", f"must be 0 for this task, whose {metric or 'metric'} is not a mean over examples"
            )
    return Parts(task, method, completed(task, method, config)[0], about, held_out)
