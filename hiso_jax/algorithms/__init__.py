"""Methods of federated training, one file each; this is their registry.

A method is a factory named as its file, ``name(learning_rate, *, options)``, that returns a
:class:`hiso_jax.fed.Algorithm`. Its keywords are its options on the command line. A user's own has the same rights: in
a file (``path/to/file.py:name``), in a module (``package.module:name``), or under the entry-point group
``hiso_jax.algorithms``.
"""

import hashlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optax import GradientTransformation

from hiso_jax import channels
from hiso_jax.algorithms._guarded import guarded
from hiso_jax.algorithms._travel import dealt, in_few_bits
from hiso_jax.checks import ParameterError
from hiso_jax.fed.algorithm import Algorithm, Factory

GROUP = "hiso_jax.algorithms"
# Every method that sends scalars can be asked for these.
SHARED: tuple[Callable[..., Algorithm], ...] = (dealt, in_few_bits, guarded)
NAMES = tuple(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
FACTORIES: dict[str, Factory] = {name: getattr(import_module(f"{__name__}.{name}"), name) for name in NAMES}
globals().update(FACTORIES)
if TYPE_CHECKING:

    def __getattr__(name: str) -> Factory:
        """A method's factory is found under its file's name."""


__all__ = ["FACTORIES", "GROUP", "NAMES", "Method", "available", "load", "load_value", "split_name", *NAMES]


def available() -> list[str]:
    """The names of all methods: those of this package, and those that other packages register."""
    return [*NAMES, *(point.name for point in entry_points(group=GROUP))]


@dataclass(frozen=True)
class Method:
    """A method by name: a factory, and channels that its messages go through beside its own.

    Attributes:
      name: as it was given, ``decomfl``, ``decomfl+median``, ``my.py:mine``.
      factory: the algorithm's.
      channels: names of channels, each a factory of ``hiso_jax.channels``.
      sha256: of the user's file that it comes from, or None.
    """

    name: str
    factory: Factory
    channels: tuple[str, ...] = ()
    sha256: str | None = None

    @property
    def title(self) -> str:
        """A name to call it by, also in a file's name."""
        return self.name.rpartition("/")[2].replace(".py:", "-").replace(":", "-")

    @cached_property
    def has_scalars(self) -> bool:
        """Whether its messages are scalars."""
        try:
            return self.factory(1e-3).has_scalars
        except Exception:
            # What is wrong with it is told when it is built.
            return False

    @property
    def is_private(self) -> bool:
        """Whether the server noises what it tells."""
        return any(channels.is_private(name) for name in self.channels)

    @property
    def needs_secret(self) -> bool:
        """Whether something is drawn that nobody else may draw, by server or clients."""
        return any(map(channels.draws_noise, self.channels))

    @property
    def factories(self) -> list[tuple[str, Callable[..., Any]]]:
        """What its options belong to, by name: its own factory, those of its channels, and what all methods share."""
        own = [(self.name, self.factory), *((name, channels.FACTORIES[name]) for name in self.channels)]
        return [*own, *((shared.__name__, shared) for shared in SHARED if self.has_scalars)]

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """Its options: the keywords of its factories; of the same name the first.

        Raises:
          ValueError: the factory is not ``name(learning_rate, *, options)``, each option with a default.
        """
        found: dict[str, inspect.Parameter] = {}
        for name, factory in self.factories:
            parameters = list(inspect.signature(factory).parameters.values())
            first = factory is self.factory or factory in SHARED
            rest = parameters[first:]
            kinds = {parameter.kind for parameter in rest} <= {inspect.Parameter.KEYWORD_ONLY}
            if len(parameters) < first or not kinds or any(p.default is p.empty for p in rest):
                raise ParameterError(
                    "algorithm",
                    f"{name} must be a function (learning_rate, *, option=default, …) → Algorithm, "
                    f"got {inspect.signature(factory)}",
                )
            found |= {parameter.name: parameter for parameter in rest if parameter.name not in found}
        return found

    def owner(self, option: str) -> Factory:
        """The factory that an option belongs to."""
        return next(factory for _, factory in self.factories if option in inspect.signature(factory).parameters)

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
          ValueError: an option is out of range, or the factory returns something else.
        """
        if self.is_private and self.has_scalars:
            # Noise on every group's sums is so many times the noise: one group, unless more are asked for.
            options = {"direction_groups": "shared", **options}

        def make(factory: Callable[..., Any], *given: Any) -> Any:
            own = {name: options[name] for name in options if self.owner(name) is factory}
            try:
                return factory(*given, **own)
            except ValueError:
                raise
            except Exception as error:
                raise ParameterError("algorithm", f"{self.name} fails: {type(error).__name__}: {error}") from error

        algorithm = make(self.factory, learning_rate)
        if not isinstance(algorithm, Algorithm):
            raise ParameterError(
                "algorithm", f"{self.name} must return a hiso_jax.fed.Algorithm, got a {type(algorithm).__name__}"
            )
        for name in self.channels:
            factory = channels.FACTORIES[name]
            made, part = make(factory), channels.part_of(factory)
            # What does not say how few bits it needs sends float32, whatever came before it.
            bits = getattr(made, "bits", 32)
            if part == "wire":
                if not algorithm.has_scalars:
                    raise ParameterError("algorithm", f"{self.name} must send scalars to go through {name}")
                algorithm = replace(algorithm, wire=made)
            elif part == "send":
                wire = replace(algorithm.wire, up_bits=bits)
                algorithm = replace(algorithm, send=(*algorithm.send, made), wire=wire)
            elif part == "attack":
                algorithm = replace(algorithm, attack=made)
            elif part == "rescale":
                algorithm = replace(algorithm, rescale=(*algorithm.rescale, made))
            else:
                algorithm = replace(algorithm, combine=made, wire=replace(algorithm.wire, down_bits=bits))
        if algorithm.is_private:
            # Shortened to a fixed norm, and by nothing that tells of the others.
            algorithm = replace(algorithm, rescale=())
        for shared in SHARED:
            algorithm = make(shared, algorithm) if algorithm.has_scalars else algorithm
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
    parts = [channels.part_of(channels.FACTORIES[channel]) for channel in through]
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
    if base in NAMES:
        return Method(name, FACTORIES[base], through)
    source, _, attribute = base.rpartition(":")
    try:
        for point in entry_points(group=GROUP):
            if point.name == base:
                return Method(name, point.load(), through)
        if not source:
            raise ParameterError("algorithm", f"must be one of {', '.join(available())}, or file.py:name; got {name!r}")
        module, sha256 = _of_file(Path(source)) if source.endswith(".py") else (import_module(source), None)
    except ValueError:
        raise
    except (Exception, SystemExit) as error:
        raise ParameterError(
            "algorithm", f"names code that cannot be loaded: {base} ({type(error).__name__}: {error})"
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found) and not isinstance(found, Algorithm | GradientTransformation):
        raise ParameterError("algorithm", f"{name} names a function that {source} does not have")
    return Method(name, getattr(module, attribute), through, sha256)


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


def _of_file(path: Path) -> tuple[Any, str]:
    """The module in a file, and the file's SHA-256."""
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ParameterError("algorithm", f"names a file that cannot be read: {path} ({error.strerror})") from error
    return _run(path.resolve(), sha256), sha256


@cache
def _run(path: Path, sha256: str) -> Any:
    """The module in a file of these bytes, run once."""
    spec = importlib.util.spec_from_file_location(f"hiso_jax_user_{path.stem}_{sha256[:8]}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses and type hints look for it.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise ParameterError(
            "algorithm", f"names a file that fails: {path} ({type(error).__name__}: {error})"
        ) from error
    return module
