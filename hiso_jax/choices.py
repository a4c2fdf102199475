"""Choices by name: an algorithm, a partition, a schedule, a task. Each is a factory whose keywords are its options.

A factory ``name(inputs, *, option=default, …)`` takes as many of the first inputs of its kind as it has positional
parameters. Its keywords are its options, in Python and on the command line, and its docstring is their help. A user's
own factory works the same way: from a file (``path/to/file.py:name``), from a module (``package.module:name``), or from
the entry-point group of its kind.
"""

import contextlib
import hashlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import docstring_parser

from hiso_jax.checks import ParameterError, did_you_mean

Factory = Callable[..., Any]
AnyFactory = TypeVar("AnyFactory", bound=Factory)


@dataclass(frozen=True)
class Option:
    """An option: a keyword of a factory, or a field of a command.

    Attributes:
      name: the name of the keyword.
      kind: its annotation.
      default: its value if it is not given.
      text: its text in --help.
    """

    name: str
    kind: Any
    default: Any
    text: str


@dataclass(frozen=True)
class Listed:
    """Marks the annotation of a tuple that is given as one comma-separated word.

    Attributes:
      convert: type of the members.
      metavar: the word's placeholder in --help.
      strip: whether blanks around a member are dropped.
    """

    convert: type
    metavar: str
    strip: bool = True

    def read(self, word: str) -> tuple[Any, ...]:
        """The members of ``word``.

        Raises:
          ValueError: a member is not of the type.
        """
        return tuple(self.convert(item.strip() if self.strip else item) for item in word.split(","))


def texts_of(documented: Any) -> dict[str, str]:
    """The text of each parameter in a docstring, and in that of the function that it wraps, see ``functools.wraps``."""
    parsed = docstring_parser.parse(documented.__doc__ or "")
    own = {each.arg_name: " ".join((each.description or "").split()) for each in parsed.params}
    wrapped = getattr(documented, "__wrapped__", None)
    return own if wrapped is None else {**texts_of(wrapped), **own}


def defaults(**values: Any) -> Callable[[AnyFactory], AnyFactory]:
    """Declare the defaults of options for when this choice is made, as in ``@defaults(rounds=24)``."""

    def declare(factory: AnyFactory) -> AnyFactory:
        vars(factory)["defaults"] = values
        return factory

    return declare


@dataclass(frozen=True)
class Kind:
    """A kind of choice: its name, and the factories to choose from.

    Attributes:
      name: the name of the option that chooses, also in errors.
      factories: the factories by name; a name with dashes may also be given with underscores.
      inputs: the names of the inputs of a factory, in their order.
      returns: the type that a factory returns, for errors.
      otherwise: makes the factory of a name that is neither known nor in a file or module; None refuses such a name.
      group: the entry-point group in which other packages register factories; by default the plural of the name.
      is_valid: whether an object is of the type that a factory returns.
    """

    name: str
    factories: Mapping[str, Factory]
    inputs: tuple[str, ...] = ()
    returns: str = ""
    group: str = ""
    otherwise: Callable[[str], Factory] | None = None
    is_valid: Callable[[Any], bool] = lambda made: True

    def available(self) -> list[str]:
        """The names of all factories: those of this package, and those that other packages register."""
        return [*self.factories, *(point.name for point in self._entry_points())]

    def _entry_points(self) -> Any:
        return entry_points(group=self.group or f"hiso_jax.{self.name}s")

    def every_option(self) -> set[str]:
        """The names of the options of this package's factories."""
        return {option for name in self.factories for option in self.load(name).options}

    def owners(self, option: str) -> list[str]:
        """The names of this package's factories that have an option."""
        return [name for name in self.factories if option in self.load(name).options]

    def load(self, name: str) -> "Choice":
        """A choice by its name.

        Args:
          name: the name of a factory of this package or of a registered one; ``path/to/file.py:name`` or
            ``package.module:name``, in which case the code of the file or module is run.

        Raises:
          ParameterError: the name is unknown, or its code cannot be loaded.
        """
        if not isinstance(name, str):
            raise ParameterError(self.name, f"must be a name, or FILE:NAME; got a value, a {type(name).__name__}")
        spelled = {each.replace("-", "_"): each for each in self.factories}
        own = spelled.get(name.replace("-", "_"))
        if own is not None:
            return Choice(self, own, self.factories[own])
        source, _, attribute = name.rpartition(":")
        try:
            for point in self._entry_points():
                if point.name == name:
                    return Choice(self, name, point.load())
            if self.otherwise is not None and not is_foreign(name):
                return Choice(self, name, self.otherwise(name))
            # Nothing else is imported: for names from an untrusted file, a caller that checks is_foreign first is safe.
            if name.endswith(".py"):
                raise ParameterError(self.name, f"must name what the file defines, as {name}:NAME; got {name!r}")
            if not is_foreign(name):
                hint = did_you_mean(name, self.factories)
                raise ParameterError(
                    self.name, f"must be one of {', '.join(self.available())}, or file.py:name; got {name!r}{hint}"
                )
            module, sha256 = self._of_file(Path(source)) if source.endswith(".py") else (import_module(source), None)
        except ValueError:
            raise
        except (Exception, SystemExit) as error:
            raise ParameterError(
                self.name, f"names code that cannot be loaded: {name} ({type(error).__name__}: {error})"
            ) from error
        found = getattr(module, attribute, None)
        if found is None:
            raise ParameterError(self.name, f"{name} names a function that {source} does not have")
        return Choice(self, name, found, sha256)

    def _of_file(self, path: Path) -> tuple[Any, str]:
        """The module in a file, and the file's SHA-256."""
        try:
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise ParameterError(self.name, f"names a file that cannot be read: {path} ({error.strerror})") from error
        try:
            return _run(path.resolve(), sha256), sha256
        except (Exception, SystemExit) as error:
            raise ParameterError(
                self.name, f"names a file that fails: {path} ({type(error).__name__}: {error})"
            ) from error


@cache
def _run(path: Path, sha256: str) -> Any:
    """The module in a file, run once per SHA-256 of the file."""
    spec = importlib.util.spec_from_file_location(f"hiso_jax_user_{path.stem}_{sha256[:8]}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and type hints look for the module there.
    sys.modules[spec.name] = module
    # As for a script, the files beside it can be imported.
    beside = str(path.parent)
    sys.path.insert(0, beside)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(beside)
    return module


def _is_readable(annotation: Any) -> bool:
    """Whether a value with this annotation can be read from a word, see ``hiso_jax.cli.arguments.read_word``."""
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        return any(isinstance(mark, Listed) for mark in marks) or _is_readable(inner)
    if get_origin(annotation) in (Union, UnionType):
        return all(map(_is_readable, get_args(annotation)))
    return get_origin(annotation) is Literal or annotation in (int, float, str, bool, Path, type(None))


def is_foreign(name: str) -> bool:
    """Whether the code of a choice comes from a file or module that its name points to, ``source:attribute``."""
    source, colon, attribute = name.rpartition(":")
    is_source = source.endswith(".py") or all(map(str.isidentifier, source.split(".")))
    # Channels may follow a method's name.
    return bool(colon) and is_source and attribute.partition("+")[0].isidentifier()


@dataclass(frozen=True)
class Choice:
    """One factory of a kind.

    Attributes:
      kind: the kind of the choice.
      name: its name, as the kind spells it or as the user gave it.
      factory: the factory.
      sha256: the SHA-256 of the user's file with the factory, or None.
    """

    kind: Kind
    name: str
    factory: Factory = field(repr=False)
    sha256: str | None = None

    @property
    def title(self) -> str:
        """A name for display and for file names."""
        return self.name.rpartition("/")[2].replace(".py:", "-").replace(":", "-")

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """The inputs of its kind that the factory takes."""
        return self.kind.inputs[: len(self._parameters) - len(self.options)]

    @cached_property
    def _parameters(self) -> list[inspect.Parameter]:
        if not callable(self.factory):
            form = f"({', '.join([*self.kind.inputs, '*', 'option=default', '…'])}) → {self.kind.returns}"
            raise ParameterError(
                self.kind.name, f"{self.name} must be a function {form}, got a {type(self.factory).__name__}"
            )
        return list(inspect.signature(self.factory).parameters.values())

    @cached_property
    def options(self) -> dict[str, Option]:
        """Its options by name.

        Raises:
          ParameterError: the factory does not have the form of its kind.
        """
        own = [parameter for parameter in self._parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
        first = self._parameters[: len(self._parameters) - len(own)]
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        if (
            len(first) > len(self.kind.inputs)
            or any(each.kind not in positional for each in first)
            or any(each.default is each.empty for each in own)
        ):
            form = ", ".join([*self.kind.inputs, "*", "option=default", "…"])
            raise ParameterError(
                self.kind.name,
                f"{self.name} must be a function ({form}) → {self.kind.returns}, got {inspect.signature(self.factory)}",
            )
        texts, found = texts_of(self.factory), {}
        for parameter in own:
            name, default = parameter.name, parameter.default
            try:
                hints = get_type_hints(self.factory, include_extras=True)
                json.dumps(default)
                if not _is_readable(hints.get(name, str)):
                    raise TypeError(f"a {hints[name]} cannot be read from a word")
            except Exception as error:
                raise ParameterError(
                    self.kind.name,
                    f"{self.name} has an option {name} that cannot be one: its annotation must be int, float, str, "
                    f"bool, Path, a Literal or a tuple marked with Listed, its default a value of that type ({error})",
                ) from error
            kind = hints.get(name, str | None if default is None else type(default))
            found[name] = Option(name, kind, default, texts.get(name, ""))
        return found

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of options that change when this factory is chosen."""
        return dict(getattr(self.factory, "defaults", {}))

    def build(self, options: Mapping[str, Any], *inputs: Any) -> Any:
        """Call the factory with its inputs, in the order of its kind, and with the entries of ``options`` that it has.

        Raises:
          ParameterError: an option is out of range, or the factory fails.
        """
        taken = inputs[: len(self.inputs)]
        own = {name: value for name, value in options.items() if name in self.options}
        try:
            made = self.factory(*taken, **own)
        except ValueError:
            raise
        except Exception as error:
            raise ParameterError(self.kind.name, f"{self.name} fails: {type(error).__name__}: {error}") from error
        if not self.kind.is_valid(made):
            raise ParameterError(
                self.kind.name, f"{self.name} must return a {self.kind.returns}, got a {type(made).__name__}"
            )
        return made


def shared_options(choices: Collection[Choice]) -> dict[str, Option]:
    """The options of choices that are made together; options of the same name must agree.

    Raises:
      ParameterError: two choices declare an option of one name differently.
    """
    found: dict[str, Option] = {}
    owner: dict[str, Choice] = {}
    for choice in choices:
        for name, option in choice.options.items():
            known = found.setdefault(name, option)
            other = owner.setdefault(name, choice)
            if (known.kind, known.default) != (option.kind, option.default):
                raise ParameterError(
                    choice.kind.name,
                    f"{choice.name} and {other.kind.name} {other.name} must agree on what {name} is, and do not",
                )
    return found
