"""Methods of federated training, one file each; this is their registry.

A method is a factory named as its file, ``name(learning_rate, *, options)``, that returns a
:class:`hiso_jax.fed.Algorithm` or an optax transformation with a head of this package. It is a choice like any other,
see :mod:`hiso_jax.choices`: its keywords are its options on the command line, and a user's own has the same rights.
"""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from optax import GradientTransformation

from hiso_jax import channels
from hiso_jax.algorithms._guarded import guarded
from hiso_jax.algorithms._wire_options import grouped, in_few_bits
from hiso_jax.checks import ParameterError
from hiso_jax.choices import Choice, Kind, Option, shared_options
from hiso_jax.fed.algorithm import Algorithm, Factory, as_algorithm

NAMES = tuple(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
FACTORIES: dict[str, Factory] = {name: getattr(import_module(f"{__name__}.{name}"), name) for name in NAMES}
globals().update(FACTORIES)
if TYPE_CHECKING:

    def __getattr__(name: str) -> Factory:
        """A method's factory is found under its file's name."""


ALGORITHMS = Kind("algorithm", FACTORIES, ("learning_rate",), "Algorithm")
# Every method that sends scalars can be asked for these.
SHARED = [
    Choice(Kind("algorithm", {}, ("algorithm",), "Algorithm"), factory.__name__, factory)
    for factory in (grouped, in_few_bits, guarded)
]

__all__ = ["ALGORITHMS", "FACTORIES", "NAMES", "Method", "available", "load", "load_value", "split_name", *NAMES]


def available() -> list[str]:
    """The names of all methods: those of this package, and those that other packages register."""
    return ALGORITHMS.available()


@dataclass(frozen=True)
class Method:
    """A method by name: a factory, and channels that its messages go through beside its own.

    Attributes:
      name: as it was given, ``decomfl``, ``decomfl+median``, ``my.py:mine``.
      choice: its factory.
      channels: names of channels, each a factory of ``hiso_jax.channels``.
    """

    name: str
    choice: Choice
    channels: tuple[str, ...] = ()

    @property
    def sha256(self) -> str | None:
        """SHA-256 of the user's file that it comes from, or None."""
        return self.choice.sha256

    @property
    def factory(self) -> Factory:
        """Its factory."""
        return self.choice.factory

    @property
    def title(self) -> str:
        """A name to call it by, also in a file's name."""
        return self.name.rpartition("/")[2].replace(".py:", "-").replace(":", "-")

    @cached_property
    def has_scalars(self) -> bool:
        """Whether its messages are scalars."""
        try:
            return as_algorithm(self.choice.factory(1e-3)).has_scalars
        except Exception:
            # What is wrong with it is told when it is built.
            return False

    @property
    def is_private(self) -> bool:
        """Whether the server noises what it broadcasts."""
        return any(channels.is_private(name) for name in self.channels)

    @property
    def needs_secret(self) -> bool:
        """Whether something is drawn that nobody else may draw, by server or clients."""
        return any(map(channels.draws_noise, self.channels))

    @cached_property
    def _own(self) -> dict[str, Option]:
        return shared_options([self.choice, *(channels.CHANNELS.load(name) for name in self.channels)])

    @cached_property
    def options(self) -> dict[str, Option]:
        """Its options by their names: its own, its channels', and what it shares with others and does not have itself.

        Raises:
          ParameterError: a factory is not of the form that it must have, or two differ in what an option is.
        """
        shared = shared_options(SHARED) if self.has_scalars else {}
        return self._own | {name: option for name, option in shared.items() if name not in self._own}

    def rate(self, *kinds: str, perturbations: int | None = None) -> float | None:
        """The learning rate that it takes by default for the first of some tasks or kinds of model that it knows.

        Args:
          kinds: names of tasks, or of kinds of model.
          perturbations: P of the run; None is the method's own.
        """
        rates, meant = getattr(self.factory, "default_rates", {}), getattr(self.factory, "rates_for", None)
        share = min(1.0, perturbations / meant) if perturbations and meant else 1.0
        return next((share * rates[kind] for kind in kinds if kind in rates), None)

    def build(self, learning_rate: Any, options: Mapping[str, Any]) -> Algorithm:
        """The algorithm, with those of ``options`` that it has.

        Raises:
          ParameterError: an option is out of range, or the factory returns something else.
        """
        if self.is_private and self.has_scalars:
            # Noise on every group's sums is so many times the noise: one group, unless more are asked for.
            options = {"direction_groups": "shared", **options}
        made = self.choice.build(options, learning_rate)
        if not isinstance(made, Algorithm | GradientTransformation):
            raise ParameterError(
                "algorithm",
                f"{self.name} must return a hiso_jax.fed.Algorithm or an optax transformation, "
                f"got a {type(made).__name__}",
            )
        algorithm = as_algorithm(made)
        for name in self.channels:
            if channels.part_of(name) == "wire" and not algorithm.has_scalars:
                raise ParameterError("algorithm", f"{self.name} must send scalars to go through {name}")
            algorithm = channels.CHANNELS.load(name).build(options).into(algorithm)
        if algorithm.is_private:
            # Shortened to a fixed norm, and by nothing that tells of the others.
            algorithm = replace(algorithm, rescale=())
        rest = {name: value for name, value in options.items() if name not in self._own}
        for shared in SHARED if algorithm.has_scalars else ():
            algorithm = shared.build(rest, algorithm)
        return algorithm


def load(name: str) -> Method:
    """A method by its name; ``name+channel`` sends its messages through a channel of ``hiso_jax.channels``.

    Args:
      name: of a method here or registered; ``path/to/file.py:name`` or ``package.module:name``. Code of the file or
        module is run.

    Raises:
      ValueError: there is none.
    """
    base, through = split_name(name)
    for channel in through:
        if channel not in channels.NAMES:
            raise ParameterError(
                "algorithm", f"{name} must go through one of {', '.join(channels.NAMES)}; got {channel!r}"
            )
    parts = [channels.part_of(channel) for channel in through]
    if parts.count("combine") > 1:
        raise ParameterError("algorithm", f"{name} must go through one combiner at most: messages are combined once")
    noising = [each for each in through if channels.draws_noise(each)]
    if len(noising) > 1:
        raise ParameterError("algorithm", f"{name} must draw noise once, got {' and '.join(noising)}")
    if any(map(channels.is_private, through)) and "rescale" in parts:
        raise ParameterError(
            "algorithm", f"{name} must not shorten messages beside private_mean, which clips them to a fixed norm"
        )
    if parts.count("attack") > 1:
        raise ParameterError("algorithm", f"{name} must go through one attack at most: the hostile are of one mind")
    return Method(name, ALGORITHMS.load(base), through)


def load_value(name: str) -> Algorithm | GradientTransformation:
    """The optimizer or algorithm that a user's file or module holds, itself or as a function without arguments.

    Args:
      name: ``path/to/file.py:name`` or ``package.module:name``. Code of the file or module is run.

    Raises:
      ValueError: there is none.
    """
    found = load(name).factory
    try:
        value = found if isinstance(found, Algorithm | GradientTransformation) else found()
    except Exception as error:
        raise ParameterError("algorithm", f"{name} must be a function without arguments ({error})") from error
    if not isinstance(value, Algorithm | GradientTransformation):
        raise ParameterError("algorithm", f"{name} must be an optimizer or an algorithm, got a {type(value).__name__}")
    return value


def split_name(name: str) -> tuple[str, tuple[str, ...]]:
    """A method's name without its channels, and these; a path may hold a ``+``, too."""
    source, colon, rest = name.rpartition(":")
    base, *through = rest.split("+")
    return f"{source}{colon}{base}", tuple(through)
