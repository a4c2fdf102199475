"""Replaced names: an error names the successor, and files keep the old names."""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from hiso_jax.checks import ParameterError, did_you_mean

F = TypeVar("F", bound=Callable[..., Any])

PARAMETERS = {"method": "difference", "moved_as": "perturbed_as", "numbers": "estimates"}
"""Options and keyword arguments of earlier releases → their names now."""

IN_FILES = {"difference": "method"}
"""Options → their names in ledgers and configuration files, if they differ: files on disk keep the old names."""

NAMES: dict[str, dict[str, str]] = {
    "hiso_jax": {"simulation": "hiso_jax.reports.Report, a callback of hiso_jax.Simulation"},
    "hiso_jax.fed": {
        "Ingredients": "hiso_jax.fed.RunSpec",
        "PrivateMean": "hiso_jax.channels.private_mean",
        "Progress": "hiso_jax.fed.Session, which callbacks are called with",
        "Rescale": "hiso_jax.fed.Clip",
        "StatefulCombine": "hiso_jax.fed.Combine(function, init=...)",
        "secret": "hiso_jax.fed.Send(function, noise=hiso_jax.fed.Noise(...))",
        "separable": "hiso_jax.fed.Send(function, separable=True) or hiso_jax.fed.Combine(function, separable=True)",
    },
    "hiso_jax.fed.Algorithm": {"made_of": "hiso_jax.fed.Algorithm.part_digests"},
    "hiso_jax.fed.Result": {"concerns": "hiso_jax.fed.Result.health_warnings"},
    "hiso_jax.fed.Senders": {"numbers": "hiso_jax.fed.Senders.client_ids"},
    "hiso_jax.fed.Simulation": {"summary": "hiso_jax.reports.Report, a callback that has the summary"},
    "hiso_jax.zo": {
        "Deal": "hiso_jax.zo.GroupedDirections",
        "dealt": "hiso_jax.zo.grouped",
        "made_whole": "hiso_jax.zo.made_dense",
        "rides": "hiso_jax.zo.shares_matmuls",
        "slopes": "hiso_jax.zo.directional_derivatives",
    },
    "hiso_jax.factored": {
        "Moved": "hiso_jax.factored.PerturbedParameter",
        "MovedAs": "hiso_jax.factored.PerturbedAs",
        "whole": "hiso_jax.factored.dense",
    },
}
"""Module → its public names of earlier releases → the name to use now."""


def successor(module: str, name: str) -> AttributeError:
    """The error of a module or class that has no ``name``; it gives the replacement, if any."""
    now = NAMES.get(module, {}).get(name)
    replaced = f"; it has been replaced by {now}" if now else ""
    error = AttributeError(f"{module} has no attribute {name!r}{replaced}")
    if module in sys.modules:
        # With the module, Python adds the closest of its names.
        error.name, error.obj = name, sys.modules[module]
    return error


def refuse_renamed(names: Mapping[str, Any]) -> None:
    """Refuse keyword arguments with names of earlier releases.

    Raises:
      ParameterError: there is such an argument; the error names its successor.
    """
    for name, now in PARAMETERS.items():
        if name in names:
            raise ParameterError(name, f"is called `{now}` now")


def with_known_names(function: F) -> F:
    """The function or class, refusing keyword arguments that it lacks; the error gives the new or the nearest name."""
    if isinstance(function, type):
        function.__init__ = with_known_names(function.__init__)  # type: ignore[misc]
        return function

    known = inspect.signature(function).parameters
    owner = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        refuse_renamed(named)
        for name in named.keys() - known.keys():
            raise ParameterError(name, f"is no parameter of {owner}{did_you_mean(name, known, quote='`')}")
        return function(*arguments, **named)

    return cast(F, call)
