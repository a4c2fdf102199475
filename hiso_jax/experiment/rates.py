"""Learning rates: the methods' defaults, grids, and a search for a rate."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hiso_jax import fed
from hiso_jax.algorithms import Method
from hiso_jax.checks import ParameterError
from hiso_jax.choices import is_foreign
from hiso_jax.experiment.build import (
    AnyTask,
    build_algorithm,
    is_language_model,
    kind_of_model,
    local_rates,
    simulation_config,
)
from hiso_jax.experiment.composed import choice_of, given_to
from hiso_jax.experiment.settings import Settings, Single, participation_of
from hiso_jax.fed.population import AnyPopulation

GRIDS = {
    "images": (0.001, 0.003, 0.01, 0.03, 0.1),
    "full": (2e-6, 1e-5, 5e-5, 2e-4),
    "adapters": (1e-3, 3e-3, 1e-2, 3e-2),
}
# Rates that --learning-rate auto tries, in units of the method's own rate.
TRIED = {"images": (1 / 3, 1, 3, 9), "full": (1 / 3, 1, 3, 9), "adapters": (1 / 3, 1, 3)}
# The rounds for each rate: a share of the run's rounds, and their minimum.
PROBE_SHARE, LEAST_PROBE = 1 / 50, 4


def rate_grid(options: Settings) -> tuple[float, ...]:
    """The default grid of learning rates for the kind of model."""
    return GRIDS[kind_of_model(options)]


def first_guess(options: Settings, method: Method) -> float:
    """The first rate of a search: the method's own, or the middle of the grid for the kind of model."""
    own, rates = default_rate(options, method), GRIDS[kind_of_model(options)]
    return rates[len(rates) // 2] if own is None else own


def learning_rate(options: Settings, method: Method, given: float | None) -> float:
    """The given rate, or the method's default rate on the task.

    Raises:
      ValueError: no rate is given, and the method has no default.
    """
    rate = default_rate(options, method) if given is None else given
    if rate is None:
        task = choice_of("task", options).name
        raise ParameterError(
            "learning_rate", f"must be given, or be auto: {method.name} has none of its own for `task` {task}"
        )
    return rate


def default_rate(options: Settings, method: Method) -> float | None:
    """The method's default rate on the task, or None."""
    task = choice_of("task", options)
    kind = kind_of_model(options) if is_language_model(task) else task.name
    return method.rate(kind, perturbations=options.perturbations)


def tried_rates(options: Settings, method: Method) -> tuple[float, ...]:
    """The learning rates that ``auto`` tries."""
    kind, own = kind_of_model(options), default_rate(options, method)
    if own is None:
        return GRIDS[kind]
    return tuple(float(f"{factor * own:.2g}") for factor in TRIED[kind])


def probe_rate(
    options: Single, method: Method, task: AnyTask, population: AnyPopulation, callback: Callable[[int, int], None]
) -> fed.RateProbe:
    """Search for a learning rate.

    Raises:
      ValueError: the loss does not stay finite at any rate.
    """
    algorithm = build_algorithm(options, method, 1.0)
    rounds = options.probe_rounds or max(LEAST_PROBE, round(PROBE_SHARE * options.rounds))
    config = replace(simulation_config(options, options.seed, algorithm), rounds=rounds, eval_every=rounds)
    # The probe keeps the run's initial rate, whatever the schedule.
    return fed.find_rate(
        task,
        lambda rate: method.build(rate, given_to(method, options)),
        population,
        replace(config, local_learning_rate=1.0),
        tried_rates(options, method),
        local_learning_rate=local_rates(replace(options, schedule="constant"), algorithm),
        participation=participation_of(options),
        callback=callback,
    )


def wanted_rate(options: Single, method: Method) -> Any:
    """The learning rate of a run: a number, or ``"auto"``.

    Raises:
      ParameterError: the method has no default rate, or a private run asks for ``auto``.
    """
    given, task = options.learning_rate, choice_of("task", options)
    if given is None and (is_language_model(task) or is_foreign(task.name)) and default_rate(options, method) is None:
        given = "auto"
    if given == "auto" and method.needs_secret:
        raise ParameterError("learning_rate", "must be a number in a private run: auto reads the losses of its clients")
    return learning_rate(options, method, given) if given != "auto" else given
