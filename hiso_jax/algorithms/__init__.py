"""The registry of the methods of federated training; each method has its own file.

A method is a factory with the name of its file, ``name(learning_rate, *, options)``. It returns a
:class:`hiso_jax.fed.Algorithm` or an optax transformation with a head of this package. Methods are choices, see
:mod:`hiso_jax.choices`: the keywords are options on the command line, and a user's own method has the same rights.
"""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial, wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any

from optax import GradientTransformation

from hiso_jax import channels
from hiso_jax.algorithms._anchored import anchored
from hiso_jax.algorithms._guarded import guarded
from hiso_jax.algorithms._wire_options import grouped, in_few_bits, measured
from hiso_jax.checks import ParameterError
from hiso_jax.choices import Choice, Kind, Option, shared_options
from hiso_jax.fed.algorithm import Algorithm, Factory, as_algorithm, made_at

NAMES = tuple(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def _with_recipe(factory: Factory) -> Factory:
    """A factory whose algorithms know how they are made, so that runs at several rates share a program."""

    @wraps(factory)
    def make(learning_rate: Any, **options: Any) -> Algorithm:
        return made_at(lambda rate: factory(rate, **options), learning_rate)

    return make


FACTORIES: dict[str, Factory] = {
    name: _with_recipe(getattr(import_module(f"{__name__}.{name}"), name)) for name in NAMES
}
globals().update(FACTORIES)
if TYPE_CHECKING:
    # A type checker would take each of these names for the module.
    from hiso_jax.algorithms.adamezo import adamezo as adamezo
    from hiso_jax.algorithms.bszo import bszo as bszo
    from hiso_jax.algorithms.decomfl import decomfl as decomfl
    from hiso_jax.algorithms.fed_adagrad import fed_adagrad as fed_adagrad
    from hiso_jax.algorithms.fed_adam import fed_adam as fed_adam
    from hiso_jax.algorithms.fed_avg import fed_avg as fed_avg
    from hiso_jax.algorithms.fed_kseed import fed_kseed as fed_kseed
    from hiso_jax.algorithms.fed_mpdd import fed_mpdd as fed_mpdd
    from hiso_jax.algorithms.fed_prox import fed_prox as fed_prox
    from hiso_jax.algorithms.fed_scalar import fed_scalar as fed_scalar
    from hiso_jax.algorithms.fed_yogi import fed_yogi as fed_yogi
    from hiso_jax.algorithms.fed_zo import fed_zo as fed_zo
    from hiso_jax.algorithms.ferret import ferret as ferret
    from hiso_jax.algorithms.fzoo import fzoo as fzoo
    from hiso_jax.algorithms.hiso import hiso as hiso
    from hiso_jax.algorithms.hiso_by_direction import hiso_by_direction as hiso_by_direction
    from hiso_jax.algorithms.hiso_frozen import hiso_frozen as hiso_frozen
    from hiso_jax.algorithms.hiso_isotropic import hiso_isotropic as hiso_isotropic
    from hiso_jax.algorithms.hiso_one_number import hiso_one_number as hiso_one_number
    from hiso_jax.algorithms.hizoo import hizoo as hizoo
    from hiso_jax.algorithms.just_one_byte import just_one_byte as just_one_byte
    from hiso_jax.algorithms.local_mosaic import local_mosaic as local_mosaic
    from hiso_jax.algorithms.meazo import meazo as meazo
    from hiso_jax.algorithms.mosaic import mosaic as mosaic
    from hiso_jax.algorithms.muon import muon as muon
    from hiso_jax.algorithms.r_adazo import r_adazo as r_adazo
    from hiso_jax.algorithms.sign import sign as sign
    from hiso_jax.algorithms.zo_adam import zo_adam as zo_adam
    from hiso_jax.algorithms.zo_align import zo_align as zo_align
    from hiso_jax.algorithms.zo_momentum import zo_momentum as zo_momentum
    from hiso_jax.algorithms.zo_mopi import zo_mopi as zo_mopi
    from hiso_jax.algorithms.zo_muon import zo_muon as zo_muon


ALGORITHMS = Kind("algorithm", FACTORIES, ("learning_rate",), "Algorithm")
# The options of every method that sends scalars.
SHARED = [
    Choice(Kind("algorithm", {}, ("algorithm",), "Algorithm"), factory.__name__, factory)
    for factory in (measured, grouped, in_few_bits, guarded, anchored)
]

__all__ = [
    "ALGORITHMS",
    "FACTORIES",
    "NAMES",
    "Method",
    "available",
    "load",
    "load_value",
    "split_name",
    *NAMES,
]


def available() -> list[str]:
    """The names of all methods: those of this package, and those that other packages register."""
    return ALGORITHMS.available()


@dataclass(frozen=True)
class Method:
    """A method by name: a factory, and further channels for its messages.

    Attributes:
      name: the name as given: ``decomfl``, ``decomfl+median``, ``my.py:mine``.
      choice: the choice with the factory.
      channels: the names of the further channels, each a factory of ``hiso_jax.channels``.
    """

    name: str
    choice: Choice
    channels: tuple[str, ...] = ()

    @property
    def sha256(self) -> str | None:
        """SHA-256 of the user's file with the factory, or None."""
        return self.choice.sha256

    @property
    def factory(self) -> Factory:
        """The factory of the method."""
        return self.choice.factory

    @property
    def title(self) -> str:
        """A short name for display, also valid in file names."""
        return self.name.rpartition("/")[2].replace(".py:", "-").replace(":", "-")

    @cached_property
    def has_scalars(self) -> bool:
        """Whether the messages are scalars."""
        try:
            return as_algorithm(self.choice.factory(1e-3)).has_scalars
        except Exception:
            # Building the method reports the error.
            return False

    @property
    def is_private(self) -> bool:
        """Whether the server adds noise to its broadcasts."""
        return any(channels.is_private(name) for name in self.channels)

    @property
    def needs_secret(self) -> bool:
        """Whether the server or the clients draw noise that must stay secret."""
        return any(map(channels.draws_noise, self.channels))

    @cached_property
    def _own(self) -> dict[str, Option]:
        return shared_options([self.choice, *(channels.CHANNELS.load(name) for name in self.channels)])

    @cached_property
    def options(self) -> dict[str, Option]:
        """The options by name: the method's, its channels', and the shared options that these do not define.

        Raises:
          ParameterError: a factory does not have the required form, or two declare an option of one name differently.
        """
        shared = shared_options(SHARED) if self.has_scalars else {}
        return self._own | {name: option for name, option in shared.items() if name not in self._own}

    def rate(self, *kinds: str, perturbations: int | None = None) -> float | None:
        """The default learning rate for the first of ``kinds`` that has one, or None.

        Args:
          kinds: names of tasks, or of kinds of model.
          perturbations: P of the run; None means the method's default.
        """
        rates, meant = getattr(self.factory, "default_rates", {}), getattr(self.factory, "rates_for", None)
        share = min(1.0, perturbations / meant) if perturbations and meant else 1.0
        return next((share * rates[kind] for kind in kinds if kind in rates), None)

    def build(self, learning_rate: Any, options: Mapping[str, Any]) -> Algorithm:
        """The algorithm, built with the options that the method has.

        Raises:
          ParameterError: an option is out of range, or the factory returns a value of another type.
        """
        # A user's function may read the digits of its rate, so it never gets a traced one from a run.
        own = FACTORIES.get(self.choice.name) is self.factory
        make = partial(self._build, options=options)
        return made_at(make, learning_rate) if own else make(learning_rate)

    def _build(self, learning_rate: Any, options: Mapping[str, Any]) -> Algorithm:
        if self.is_private and self.has_scalars:
            # The sums of every group get their own noise, so one group is the default.
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
            # Messages are clipped only to a fixed norm: other clipping would reveal the messages of other clients.
            algorithm = replace(algorithm, rescale=())
        rest = {name: value for name, value in options.items() if name not in self._own}
        for shared in SHARED if algorithm.has_scalars else ():
            # A method that defines all of these options has used them itself.
            if not {*shared.options} <= {*self._own}:
                algorithm = shared.build(rest, algorithm)
        return algorithm


def load(name: str) -> Method:
    """A method by its name; ``name+channel`` sends its messages through a channel of ``hiso_jax.channels``.

    Args:
      name: the name of a method here or registered, ``path/to/file.py:name`` or ``package.module:name``. The code of
        the file or module is run.

    Raises:
      ValueError: the method or a channel does not exist, or the channels do not go together.
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
            "algorithm", f"{name} must not clip messages beside private_mean, which clips them to a fixed norm"
        )
    if parts.count("attack") > 1:
        raise ParameterError(
            "algorithm", f"{name} must go through one attack at most, because all hostile clients use the same attack"
        )
    return Method(name, ALGORITHMS.load(base), through)


def load_value(name: str) -> Algorithm | GradientTransformation:
    """The optimizer or algorithm in a user's file or module, as a value or from a function without arguments.

    Args:
      name: ``path/to/file.py:name`` or ``package.module:name``. The code of the file or module is run.

    Raises:
      ValueError: the name does not exist, or gives neither an optimizer nor an algorithm.
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
    """A method's name and its channels, separately; a path may contain a ``+``, too."""
    source, colon, rest = name.rpartition(":")
    base, *through = rest.split("+")
    return f"{source}{colon}{base}", tuple(through)
