"""A search for a learning rate: each rate runs a few rounds from the same start, on the same cohorts and batches."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Float, Int

from hiso_jax.checks import ParameterError
from hiso_jax.fed.algorithm import as_algorithm
from hiso_jax.fed.keys import init_key
from hiso_jax.fed.population import AnyPopulation, Participation
from hiso_jax.fed.run.config import SimulationConfig
from hiso_jax.fed.run.grid import Grid
from hiso_jax.fed.run.invitation import probing_clients, probing_in
from hiso_jax.fed.run.prepared import estimator_of
from hiso_jax.fed.run.programs import costs_of
from hiso_jax.fed.run.state import RoundLog
from hiso_jax.fed.run.sweep import MakeAlgorithm, sweep
from hiso_jax.fed.run.traffic import Traffic, last_synced_rounds
from hiso_jax.fed.task import HeldOut, Task
from hiso_jax.fed.update import ServerState

# The rate at which the loss falls fastest at first may be too high for a long run. On the digits it was too high for
# HiSo, DeComFL and ZO-Adam if the next rate, three times as high, led to more than 1.5 times its loss or diverged. A
# third of it was then the best rate for 1,000 rounds, and the fastest rate made DeComFL diverge.
TOO_MUCH, SHARE = 1.5, 1 / 3


@dataclass(frozen=True)
class RateProbe:
    """The result of trying some learning rates.

    Attributes:
      learning_rate: the chosen rate, to two digits: the fastest, or a third of it if the next higher rate diverged or
        has more than 1.5 times its loss, or no higher rate was tried.
      fastest: the rate at which losses fell lowest.
      learning_rates: the rates that were tried, L.
      losses: the mean cohort loss of each rate over the second half of its rounds, NaN if it diverged, [L].
      start: the mean cohort loss of the first round.
      rounds: the number of rounds for which each rate was tried.
      bytes_up, bytes_down, forward_passes: totals over all rates.
    """

    learning_rate: float
    fastest: float
    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    start: float
    rounds: int
    bytes_up: int
    bytes_down: int
    forward_passes: int

    @property
    def reason(self) -> str:
        """The reason for the choice, as a clause."""
        if self.fastest == max(self.learning_rates):
            return "a third of the fastest, beyond which none was tried"
        if self.learning_rate != self.fastest:
            return "a third of the fastest, beyond which the loss rises"
        edge = ", which is the smallest that was tried" if self.fastest == min(self.learning_rates) else ""
        return f"the fastest{edge}"


class _Watch:
    """The losses of every rate, and the arrays that its costs are counted from."""

    def __init__(self, rates: int, rounds: int) -> None:
        self.losses = np.full((rates, rounds), np.nan)
        self.columns: dict[str, list[list[np.ndarray]]] = {
            name: [[] for _ in range(rates)] for name in ("cohort", "attendance", "valid", "version")
        }

    def __call__(self, group: tuple[int, ...], rounds: Int[np.ndarray, "R"], log: RoundLog) -> None:
        numbers = range(self.losses.shape[0]) if len(group) < 3 else [group[2]]
        flat = {"loss": log.record.loss, "valid": log.record.valid, "cohort": log.cohort, "attendance": log.attendance}
        if log.version is not None:
            flat["version"] = log.version
        lead = 3 - len(group)
        for place, rate in enumerate(numbers):
            own = {name: np.asarray(array).reshape(-1, *np.shape(array)[lead:])[place] for name, array in flat.items()}
            self.losses[rate, rounds] = own["loss"]
            for name in own.keys() & self.columns.keys():
                self.columns[name][rate].append(own[name])


def _means(losses: Float[np.ndarray, "L R"]) -> Float[np.ndarray, "L"]:
    """The mean loss over the rounds that have a loss; NaN if no round has."""
    has = ~np.isnan(losses)
    return np.where(has, losses, 0).sum(1) / np.where(has.any(1), has.sum(1), np.nan)


def find_rate(
    task: Task,
    make: MakeAlgorithm,
    population: AnyPopulation,
    config: SimulationConfig,
    learning_rates: Sequence[float],
    *,
    local_learning_rate: Callable[[Any], optax.ScalarOrSchedule] | None = None,
    participation: Participation | None = None,
    callback: Callable[[int, int], None] = lambda done, rounds: None,
) -> RateProbe:
    """Try learning rates, and choose the rate at which clients' losses fall lowest, or a third of it.

    Every rate runs the first ``config.rounds`` rounds of the run from the same parameters, with the cohorts, batches
    and directions of the run itself, so the losses are paired. They are the losses that clients compute anyway; no
    data are held out, and the test split is not used. The rate at which losses fall fastest at first may be too high
    for a long run. A third of it is chosen if the next higher rate diverged or has more than 1.5 times its loss, or no
    higher rate was tried.

    Args:
      task: the task of the run.
      make: learning rate, a traced scalar → algorithm or optimizer.
      population: the population of the run.
      config: the configuration of the run, except for ``rounds``, the number of rounds for which to try each rate.
      learning_rates: learning rates to try, L.
      local_learning_rate: a rate → the rate of the clients' own steps.
      participation: the participation of the run.
      callback: called with (rounds done, rounds) from time to time.

    Raises:
      ValueError: no rate is given, the loss stays finite at none, or the algorithm draws noise that must stay secret.
    """
    if as_algorithm(make(1.0)).needs_secret:
        raise ParameterError("learning_rate", "must be a number in a private run: a search reads the clients' losses")
    few = jax.tree.map(lambda array: array[:1], task.test)
    grid = Grid(tuple(sorted(learning_rates)), (config.seed,), None, local_learning_rate)
    watch = _Watch(len(grid.learning_rates), config.rounds)
    result = sweep(
        HeldOut(task, task.train, few),
        make,
        [population],
        config,
        grid,
        participation=participation,
        callback=callback,
        watch=watch,
    )
    late = watch.losses[:, config.rounds // 2 :]
    # A round in which no client counts has no loss.
    means = np.where(result.diverged_at[0, 0] >= 0, np.nan, _means(late))
    if not np.isfinite(means).any():
        tried = ", ".join(f"{rate:g}" for rate in grid.learning_rates)
        raise ParameterError("learning_rate", f"must be given: at none of {tried} does the loss stay finite")
    place = int(np.nanargmin(means))
    best, beyond = grid.learning_rates[place], [mean for mean in means[place + 1 : place + 2] if np.isfinite(mean)]
    share = 1.0 if beyond and beyond[0] <= TOO_MUCH * means[place] else SHARE
    presence, clients = participation or Participation(), population.num_clients
    totals = [_traffic(make, task, config, presence, watch, number, clients) for number in range(len(means))]
    return RateProbe(
        float(f"{share * best:.2g}"),
        float(best),
        tuple(map(float, grid.learning_rates)),
        tuple(map(float, means)),
        float(next((loss for loss in watch.losses[0] if math.isfinite(loss)), math.nan)),
        config.rounds,
        sum(total.bytes_up for total in totals),
        sum(total.bytes_down for total in totals),
        sum(total.forward_passes for total in totals),
    )


def _traffic(
    make: MakeAlgorithm,
    task: Task,
    config: SimulationConfig,
    participation: Participation,
    watch: _Watch,
    number: int,
    clients: int,
) -> Traffic:
    """The traffic of one rate's rounds."""
    algorithm = as_algorithm(make(1.0))
    params = jax.eval_shape(task.init, init_key(jax.random.key(config.seed)))
    server = ServerState(params, jax.eval_shape(algorithm.optimizer.init, params), None)
    traffic = Traffic(costs_of(algorithm, estimator_of(algorithm, config), server, config))
    columns: dict[str, Float[np.ndarray, "R C"]] = {
        name: np.concatenate(parts[number]) for name, parts in watch.columns.items() if parts[number]
    }
    rounds, version = np.arange(len(columns["cohort"])), columns.get("version")
    begun = rounds if version is None else version
    last_synced, _ = last_synced_rounds(begun, columns["cohort"], columns["attendance"], clients)
    probing = probing_clients(config, participation, jax.random.key(config.seed), clients)
    limited = probing_in(probing, columns["cohort"])
    traffic.add(rounds, columns["attendance"], last_synced, columns["valid"], limited, version)
    return traffic
