"""What may happen to messages between clients and server, and how they become one: one file each.

A channel is a factory named as its file, ``name(*, options)``; its keywords are its options on the command line. What
it returns its annotation says: a :data:`~hiso_jax.fed.algorithm.Send`, an :class:`~hiso_jax.fed.algorithm.Attack`, a
:class:`~hiso_jax.fed.algorithm.Rescale`, a :data:`~hiso_jax.fed.algorithm.Combine` or
:class:`~hiso_jax.fed.algorithm.PrivateMean`, or a :class:`~hiso_jax.fed.wire.Wire`.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from hiso_jax.choices import Kind
from hiso_jax.fed.algorithm import Algorithm, Attack, PrivateMean, Rescale, Send, Wire

NAMES = tuple(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
FACTORIES: dict[str, Callable[..., Any]] = {name: getattr(import_module(f"{__name__}.{name}"), name) for name in NAMES}
globals().update(FACTORIES)
if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., Any]:
        """A channel's factory is found under its file's name."""


CHANNELS = Kind("channel", FACTORIES)

__all__ = [
    "CHANNELS", "FACTORIES", "NAMES", "Part", "draws_noise", "is_private", "names_of", "part_of", "through", *NAMES,
]  # fmt: skip


Part = Literal["send", "attack", "rescale", "combine", "wire"]


def part_of(factory: Callable[..., Any]) -> Part:
    """Which part of an algorithm a factory makes."""
    made = get_type_hints(factory)["return"]
    parts: dict[Any, Part] = {Send: "send", Attack: "attack", Rescale: "rescale", Wire: "wire"}
    return parts.get(made, "combine")


def is_private(name: str) -> bool:
    """Whether a channel noises what everyone is told."""
    return get_type_hints(FACTORIES[name])["return"] is PrivateMean


def draws_noise(name: str) -> bool:
    """Whether a channel draws noise that nobody may know, of clients or of the server."""
    return "noise_multiplier" in signature(FACTORIES[name]).parameters


def names_of(*parts: Part) -> tuple[str, ...]:
    """The names of the channels that make one of these parts."""
    return tuple(name for name in NAMES if part_of(FACTORIES[name]) in parts)


def through(algorithm: Algorithm, name: str, made: Any) -> Algorithm:
    """The algorithm with its messages going through what the channel ``name`` made."""
    part = part_of(FACTORIES[name])
    # What does not say how few bits it needs sends float32, whatever came before it.
    bits = getattr(made, "bits", 32)
    if part == "wire":
        return replace(algorithm, wire=made)
    if part == "send":
        return replace(algorithm, send=(*algorithm.send, made), wire=replace(algorithm.wire, up_bits=bits))
    if part == "attack":
        return replace(algorithm, attack=made)
    if part == "rescale":
        return replace(algorithm, rescale=(*algorithm.rescale, made))
    return replace(algorithm, combine=made, wire=replace(algorithm.wire, down_bits=bits))
