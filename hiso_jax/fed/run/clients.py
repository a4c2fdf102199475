"""How a model does for each client, on the client's own examples."""

import jax
import numpy as np
from jaxtyping import Float, PyTree

from hiso_jax.fed.population import Population
from hiso_jax.fed.run.evaluation import make_evaluate
from hiso_jax.fed.task import Task, frozen_of


def client_metrics(task: Task, params: PyTree, population: Population) -> dict[str, Float[np.ndarray, "N"]]:
    """The task's metrics for every client: means over the training examples that the client holds.

    What an average hides is seen here: whom a model serves badly.

    Args:
      task: whose ``metrics`` are taken.
      params: of the model, a run's ``result.params`` say.
      population: who holds which training examples.

    Raises:
      ValueError: the population is of other data.

    Example:
      >>> import hiso_jax
      >>> from hiso_jax import fed, tasks
      >>> task = tasks.digits()
      >>> population = fed.dirichlet(task.train["label"], 20, alpha=0.5)
      >>> config = fed.SimulationConfig(rounds=10, cohort=4, eval_every=10)
      >>> result = fed.Simulation(task, hiso_jax.hiso(1e-2), population, config).run()
      >>> fed.client_metrics(task, result.params, population)["loss"].shape
      (20,)
    """
    population.check(len(jax.tree.leaves(task.train)[0]))
    held, offsets = np.asarray(population.indices), np.asarray(population.offsets)
    values = jax.jit(make_evaluate(task.metrics))(params, task.train, frozen_of(task))
    sizes = np.diff(offsets)
    means = {}
    for name, column in values.items():
        own = np.asarray(column, np.float64)
        if own.ndim == 1:
            means[name] = np.add.reduceat(own[held], offsets[:-1]) / sizes
    return means
