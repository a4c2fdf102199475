"""Modules of an extra, which a plain installation lacks because they are large."""

from importlib import import_module
from typing import Any

from hiso_jax.checks import ParameterError


def import_extra(module: str, parameter: str, sentence: str) -> Any:
    """A module of the extra ``datasets``, imported at its first use.

    Args:
      module: its name.
      parameter: the parameter that needs it.
      sentence: the valid values without it, for the error.

    Raises:
      ParameterError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ParameterError(parameter, f"{sentence} without {package}; pip install {package} installs it") from error
