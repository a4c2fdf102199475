"""The costs of a round, known before any round is run, so that methods can get equal budgets."""

import random
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from hiso_jax.fed.algorithm import Algorithm
from hiso_jax.fed.keys import traits_key
from hiso_jax.fed.population import Participation, Work
from hiso_jax.fed.run.config import SimulationConfig
from hiso_jax.fed.run.invitation import probing_clients
from hiso_jax.fed.run.prepared import estimator_of
from hiso_jax.fed.run.programs import costs_of
from hiso_jax.fed.run.traffic import directions_made, download_bytes, upload_bytes
from hiso_jax.fed.task import Task
from hiso_jax.fed.update import ServerState

# The number of cohorts whose times are averaged.
COHORTS = 256


class RoundCosts(NamedTuple):
    """The costs of a round in which every client comes.

    Attributes:
      rounds: 1.
      passes: forward passes of all clients, the mean of a mixed cohort.
      bytes: bytes sent up by all clients.
      seconds: simulated seconds until the slowest client of the cohort is done, or with a buffer of B until B of the
        clients at work are; each has missed N/C rounds, or N/B. 0 without a fleet.
    """

    rounds: int
    passes: float
    bytes: int
    seconds: float


def round_costs(
    task: Task, algorithm: Algorithm, config: SimulationConfig, clients: int, participation: Participation
) -> RoundCosts:
    """The costs of a round, from shapes alone.

    Args:
      task: the task, whose parameters are trained.
      algorithm: the method.
      config: the run's configuration.
      clients: N, the size of the population.
      participation: the participation, with the fleet.

    Raises:
      ValueError: messages, cohort and method do not fit together.
    """
    params = jax.eval_shape(task.init, jax.random.key(0))
    state = jax.eval_shape(algorithm.optimizer.init, params)
    costs = costs_of(algorithm, estimator_of(algorithm, config), ServerState(params, state), config)
    draw, answers, shape = random.Random(config.seed), config.answers, (COHORTS, config.cohort)
    drawn = jnp.asarray([draw.sample(range(clients), config.cohort) for _ in range(COHORTS)]).reshape(-1)
    probing = probing_clients(config, participation, jax.random.key(config.seed), clients)
    each_passes, passes = jnp.float32(costs.passes), float(answers * costs.passes)
    if probing is not None:
        each_passes = jnp.where(probing(drawn), float(costs.probe_passes), each_passes)
        share = float(np.asarray(probing(jnp.arange(clients))).mean())
        passes = answers * (costs.passes + share * (costs.probe_passes - costs.passes))
    seconds: Any = 0.0
    if participation.fleet is not None:
        missed = max(1, clients // answers)
        broadcast = costs.broadcast.fixed + costs.broadcast.each * answers
        down = download_bytes(np.asarray(missed * broadcast), np.asarray(False), costs)
        made = directions_made(np.asarray(missed * broadcast), missed, costs)
        work = jax.tree.map(jnp.float32, Work(down, upload_bytes(costs), each_passes, made))
        # The key of the speeds of the run's clients.
        speeds = jax.random.fold_in(traits_key(jax.random.key(config.seed)), 1)
        each = np.asarray(participation.fleet.seconds(speeds, drawn, work))
        seconds = _seconds_of_round(np.asarray(drawn).reshape(shape), each.reshape(shape), answers)
    return RoundCosts(1, passes, answers * upload_bytes(costs), seconds)


def _seconds_of_round(cohorts: Int[np.ndarray, "R C"], visits: Float[np.ndarray, "R C"], answers: int) -> float:
    """The mean time until ``answers`` of the C clients at work are done, and as many of the next cohort begin.

    Slow clients stay at work while others come and go, so the clock of R rounds is run.
    """
    clients, left, seconds = cohorts[0], visits[0], []
    for place in range(len(cohorts)):
        order = np.argsort(left)
        clients, left = clients[order], left[order]
        seconds.append(left[answers - 1])
        clients, left = clients[answers:], left[answers:] - left[answers - 1]
        following = (place + 1) % len(cohorts)
        free = np.flatnonzero(~np.isin(cohorts[following], clients))[:answers]
        clients = np.concatenate([clients, cohorts[following][free]])
        left = np.concatenate([left, visits[following][free]])
    return float(np.mean(seconds))
