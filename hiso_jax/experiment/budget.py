"""The noise multiplier that meets a privacy budget, and checks of the options of private runs."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax

from hiso_jax.checks import ParameterError
from hiso_jax.experiment.composed import choice_of
from hiso_jax.experiment.settings import Settings
from hiso_jax.fed.privacy import Sampling, is_installed, most_visits, noise_for


def noise_for_budget(options: Settings, private: bool, seeds: Sequence[int], sensitivity: int = 1) -> float:
    """The noise multiplier that keeps each of several runs within ``options.epsilon``.

    Args:
      options: the settings of the runs.
      private: whether the server adds noise to sums, and may keep its cohorts secret.
      seeds: the seeds of the runs; if cohorts follow from the seeds, the seed that invites one client most often
        needs the most noise.
      sensitivity: how many messages of a cohort change with one client's data.

    Raises:
      ValueError: the accountant is not installed, or no noise meets the budget.
    """
    if not is_installed():
        raise ParameterError("epsilon", "needs dp-accounting to find the noise: pip install '.[privacy]'")
    assert options.epsilon is not None
    clients, cohort, rounds = options.clients, options.cohort, options.rounds
    visits = None
    if not private or options.public_cohorts:
        visits = max(_visits(clients, cohort, rounds, seed) for seed in seeds)
    return sensitivity * _noise(options.epsilon, options.delta, Sampling(clients, cohort, rounds, visits))


@cache
def _visits(clients: int, cohort: int, rounds: int, seed: int) -> int:
    return most_visits(jax.random.key(seed), clients, cohort, rounds)


@cache
def _noise(epsilon: float, delta: float, sampling: Sampling) -> float:
    return noise_for(epsilon, sampling, delta=delta)


def check_private(options: Any, methods: Any, given: Any) -> None:
    """Refuse privacy options that no method reads, and options that would reveal the losses of clients.

    Args:
      options: all options.
      methods: the methods that the command runs.
      given: the names of the options that were given.

    Raises:
      ValueError: there is such an option; the error names it.
    """
    secretive = [method for method in methods if method.needs_secret]
    for name in ("epsilon", "delta", "public_cohorts"):
        if name in given and not secretive:
            raise ParameterError(name, "is read with `combine` private_mean, or by an algorithm through local_noise")
    if "guard" in given and options.guard and any(method.is_private for method in methods):
        raise ParameterError(
            "guard", "must not be asked for with private_mean, which clips every message to a fixed norm"
        )
    if "epsilon" in given and "noise_multiplier" in given:
        raise ParameterError("epsilon", "must not be given beside `noise_multiplier`, which it finds")
    if "public_cohorts" in given and not any(method.is_private for method in methods):
        raise ParameterError(
            "public_cohorts", "is read with `combine` private_mean; the server of local noise knows its cohorts"
        )
    if secretive and getattr(options, "learning_rate", None) == "auto":
        raise ParameterError("learning_rate", "must be a number in a private run: auto reads the losses of its clients")
    partition = choice_of("partition", options)
    if secretive and options.epsilon is not None and "clients" not in partition.inputs:
        raise ParameterError(
            "epsilon",
            f"must be left to `noise_multiplier` with `partition` {partition.name}: how many clients there are is not "
            "known",
        )
