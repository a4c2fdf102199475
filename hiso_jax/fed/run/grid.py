"""A grid of settings, and the results of a sweep over it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optax
from jaxtyping import Float, Int

from hiso_jax.checks import ParameterError, integer, positive
from hiso_jax.fed.run import monitor as monitoring
from hiso_jax.fed.run.evaluation import first_at_target
from hiso_jax.fed.task import Metric

LAST_EVALUATIONS = 3


@dataclass(frozen=True)
class Grid:
    """The settings of a sweep: all combinations of S seeds × M smoothing radii × L learning rates.

    Attributes:
      learning_rates: learning rates to try, L.
      seeds: seeds to try, S.
      mus: smoothing radii to try, M; None means the configuration's μ.
      local_learning_rate: a learning rate of the grid → the rate of the clients' own steps, a number or a schedule; by
        default the same, or for projections the configuration's.
      local_rates: the rates of the clients' own steps, one for each learning rate, [L], in place of
        ``local_learning_rate``; None for no rates of their own.
      over_rounds: the rates over the rounds, [L, R]. The method is then made with a schedule that reads a row, so that
        one program runs every rate with every schedule. Its last bits are not those of the schedule itself, which a
        compiler may fuse, so it is for searches. None makes the method with the learning rate.
    """

    learning_rates: Sequence[float]
    seeds: Sequence[int] = (0,)
    mus: Sequence[float] | None = None
    local_learning_rate: Callable[[Any], optax.ScalarOrSchedule] | None = None
    over_rounds: Float[np.ndarray, "L R"] | None = None
    local_rates: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
          ValueError: the grid is empty, or a rate, μ or seed is out of range.
        """
        named = ("learning_rates", self.learning_rates), ("mus", self.mus), ("local_rates", self.local_rates)
        for name, values in named:
            for value in () if values is None else values:
                positive(name, value)
            if values is not None and not len(values):
                raise ParameterError(name, "must name at least one value")
        if self.local_rates is not None and len(self.local_rates) != len(self.learning_rates):
            raise ParameterError("local_rates", f"must have one for each of {len(self.learning_rates)} learning rates")
        if self.over_rounds is not None and len(self.over_rounds) != len(self.learning_rates):
            raise ParameterError(
                "over_rounds", f"must have a row for each of {len(self.learning_rates)} learning rates"
            )
        if not len(self.seeds):
            raise ParameterError("seeds", "must name at least one seed")
        for seed in self.seeds:
            integer("seeds", seed, 0, 2**31)


@dataclass(frozen=True)
class Best:
    """The best setting of a sweep.

    Attributes:
      learning_rate, mu: the setting.
      rounds_to_target: the mean over the seeds; None if no setting reached the target with every seed. The setting is
        then that with the best final value.
      final: the final metric, the mean over the last three evaluations and the seeds.
      at_edge: whether the rate, or that of the clients, is the smallest or the largest of several tried.
      local_rate: the rate of the clients' own steps, if several were tried.
    """

    learning_rate: float
    mu: float
    rounds_to_target: float | None
    final: float
    at_edge: bool
    local_rate: float | None = None


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep: S seeds, M values of μ, L learning rates, E evaluations.

    Attributes:
      seeds, mus, learning_rates: the grid.
      rounds: the rounds of the evaluations, [E].
      metric: the metric that settings are compared by.
      metrics: the task's metrics on its test split, each [S, M, L, E]; NaN after an interrupt.
      diverged_at: the round at which a run diverged or -1, [S, M, L].
      interrupted: whether the sweep was stopped before its last round.
      compile_seconds, run_seconds: time spent.
      local_rates: the rates of the clients' own steps, one for each learning rate, [L], if these were tried, too.
    """

    seeds: tuple[int, ...]
    mus: tuple[float, ...]
    learning_rates: tuple[float, ...]
    rounds: Int[np.ndarray, "E"]
    metric: Metric
    metrics: dict[str, Float[np.ndarray, "S M L E"]]
    diverged_at: Int[np.ndarray, "S M L"]
    interrupted: bool
    compile_seconds: float
    run_seconds: float
    local_rates: tuple[float, ...] | None = None

    def final(self) -> Float[np.ndarray, "S M L"]:
        """The mean of each run's last three evaluations; the worst value for a run that diverged or was cut short."""
        values = self.metrics[self.metric.name][..., -LAST_EVALUATIONS:].mean(-1)
        return np.where((self.diverged_at == monitoring.NEVER) & np.isfinite(values), values, self.metric.worst)

    def rounds_to(self, target: float) -> Float[np.ndarray, "S M L"]:
        """The round at which each run reached ``target`` (see ``first_at_target``), or infinity."""
        first, values = np.full(self.diverged_at.shape, math.inf), self.metric.sign * self.metrics[self.metric.name]
        for index in np.ndindex(first.shape):
            reached = first_at_target(values[index].tolist(), self.metric.sign * target)
            if reached is not None and self.diverged_at[index] == monitoring.NEVER:
                first[index] = self.rounds[reached]
        return first

    def best(self, target: float | None) -> Best:
        """The setting that reaches the shared target soonest with every seed, or else has the best final value."""
        final = self.final().mean(0)
        first = np.full(final.shape, math.inf) if target is None else self.rounds_to(target).mean(0)
        reached = bool(np.isfinite(first).any())
        # Among settings that are equally soon, the best final value decides.
        order = np.lexsort((-self.metric.sign * final.reshape(-1), first.reshape(-1)))
        m, rate = np.unravel_index(order[0], final.shape)
        local = None if self.local_rates is None else self.local_rates[rate]

        def is_edge(value: float | None, tried: tuple[float, ...] | None) -> bool:
            return tried is not None and len(set(tried)) > 1 and value in (min(tried), max(tried))

        return Best(
            learning_rate=self.learning_rates[rate],
            mu=self.mus[m],
            rounds_to_target=float(first[m, rate]) if reached else None,
            final=float(final[m, rate]),
            at_edge=is_edge(self.learning_rates[rate], self.learning_rates) or is_edge(local, self.local_rates),
            local_rate=local,
        )
