"""Experiments: choices and options, resolved once, the same way from Python and from the command line."""

from hiso_jax.experiment.build import (
    build_algorithm,
    build_population,
    build_schedule,
    build_task,
    check_methods,
    is_language_model,
    local_rates,
    notes,
    own_local_rate,
    recorded_algorithm,
    simulation_config,
    target_of,
    virtual_note,
)
from hiso_jax.experiment.clock import Clock
from hiso_jax.experiment.composed import (
    KINDS,
    NESTED,
    choice_of,
    given_to,
    methods_of,
    nested_choices,
    options_with,
    own_options,
)
from hiso_jax.experiment.experiment import Experiment
from hiso_jax.experiment.rates import (
    default_rate,
    first_guess,
    learning_rate,
    probe_rate,
    rate_grid,
    tried_rates,
    wanted_rate,
)
from hiso_jax.experiment.recorded import about_of, as_written, of_clients
from hiso_jax.experiment.resolve import DECIDING, Resolved, resolve, unknown
from hiso_jax.experiment.settings import Settings, Single, participation_of

__all__ = [
    "DECIDING",
    "KINDS",
    "NESTED",
    "Clock",
    "Experiment",
    "Resolved",
    "Settings",
    "Single",
    "about_of",
    "as_written",
    "build_algorithm",
    "build_population",
    "build_schedule",
    "build_task",
    "check_methods",
    "choice_of",
    "default_rate",
    "first_guess",
    "given_to",
    "is_language_model",
    "learning_rate",
    "local_rates",
    "methods_of",
    "nested_choices",
    "notes",
    "of_clients",
    "options_with",
    "own_local_rate",
    "own_options",
    "participation_of",
    "probe_rate",
    "rate_grid",
    "recorded_algorithm",
    "resolve",
    "simulation_config",
    "target_of",
    "tried_rates",
    "unknown",
    "virtual_note",
    "wanted_rate",
]
