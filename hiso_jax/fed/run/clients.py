"""The metrics of a model for each client, on the client's own examples."""

from itertools import pairwise

import jax
import numpy as np
from jaxtyping import Float, PyTree

from hiso_jax.checks import arrays as check_arrays
from hiso_jax.checks import integer, of_kind
from hiso_jax.fed.population import Population, as_population
from hiso_jax.fed.run.evaluation import make_evaluate
from hiso_jax.fed.task import Task, frozen_of, summarise


def client_metrics(
    task: Task, params: PyTree, population: Population, *, most: int | None = None
) -> dict[str, Float[np.ndarray, "N"]]:
    """The task's metrics for every client, over the training examples that the client holds.

    They show the clients that a model serves badly, which an average hides.

    Args:
      task: the task, whose ``metrics`` are computed.
      params: the model's parameters, for example a run's ``result.params``.
      population: the clients and the training examples that each holds.
      most: the number of a client's examples to read, the first that it holds; None reads all.

    Raises:
      ValueError: the population is for other data, or ``most`` < 1.

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
    population = as_population(population)
    of_kind("population", population, Population, "a population of stored indices, such as fed.dirichlet returns")
    of_kind("task", task, Task, "a task")
    check_arrays("params", params)
    population.check(len(jax.tree.leaves(task.train)[0]))
    if most is not None:
        integer("most", most, 1)
    indices, offsets = np.asarray(population.indices), np.asarray(population.offsets)
    sizes = np.diff(offsets) if most is None else np.minimum(np.diff(offsets), most)
    held = np.concatenate([indices[begin : begin + size] for begin, size in zip(offsets[:-1], sizes, strict=True)])
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    read = jax.tree.map(lambda column: column[held], task.train)
    values = jax.jit(make_evaluate(task.metrics))(params, read, frozen_of(task))
    host = {name: np.asarray(column) for name, column in values.items()}
    own = [
        summarise(task, {name: column[begin:end] for name, column in host.items()}) for begin, end in pairwise(offsets)
    ]
    return {name: np.array([each[name] for each in own]) for name in own[0]}
