"""Channels: changes of messages between clients and server, and combiners of messages; each has its own file.

A channel is a factory with the name of its file, ``name(*, options)``; the keywords are options on the command line. It
returns a :class:`~hiso_jax.fed.Send`, an :class:`~hiso_jax.fed.Attack`, a :class:`~hiso_jax.fed.Clip`, a
:class:`~hiso_jax.fed.Combine` or a :class:`~hiso_jax.fed.Wire`; ``.into(algorithm)`` adds it to an algorithm.
"""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hiso_jax.choices import Kind
from hiso_jax.fed.algorithm import Attack, Clip, Combine, Part, Send, Wire

NAMES = tuple(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
FACTORIES: dict[str, Callable[..., Any]] = {name: getattr(import_module(f"{__name__}.{name}"), name) for name in NAMES}
globals().update(FACTORIES)
if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., Any]:
        """The factory of a channel, by the name of its file."""


Channel = Send | Attack | Clip | Combine | Wire

CHANNELS = Kind("channel", FACTORIES)

__all__ = [
    "CHANNELS", "FACTORIES", "NAMES", "Channel", "Part", "draws_noise", "is_private", "names_of", "part_of", *NAMES,
]  # fmt: skip


def made_by_default(name: str) -> Channel:
    """A channel built with its default options; the properties that it declares do not depend on options."""
    return FACTORIES[name]()


def part_of(name: str) -> Part:
    """The part of an algorithm that a channel provides."""
    return made_by_default(name).part


def names_of(*parts: Part) -> tuple[str, ...]:
    """The names of the channels that provide one of ``parts``."""
    return tuple(name for name in NAMES if part_of(name) in parts)


def draws_noise(name: str) -> bool:
    """Whether a channel draws private noise, on the clients or on the server."""
    return getattr(made_by_default(name), "noise", None) is not None


def is_private(name: str) -> bool:
    """Whether a channel makes the server add noise to its broadcasts."""
    return part_of(name) == "combine" and draws_noise(name)
