"""The options of a command, composed from its own and from those of the methods that it is asked for."""

import json
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from functools import cache
from typing import Any, get_type_hints

import docstring_parser

from hiso_jax import algorithms
from hiso_jax.algorithms import Method
from hiso_jax.checks import ParameterError

# What --help answers to.
RESERVED = ("help", "h")


@dataclass(frozen=True)
class Option:
    """An option as a command line has it.

    Attributes:
      name: of the field.
      kind: its annotation.
      default: what it is if it is not given.
      text: what --help says of it.
    """

    name: str
    kind: Any
    default: Any
    text: str


def _default(of: Field) -> Any:
    return of.default_factory() if of.default_factory is not MISSING else of.default


@cache
def own_options(command: Any) -> dict[str, Option]:
    """The options of a command's dataclass, documented in its docstring or in those of its bases."""
    kinds = get_type_hints(command, include_extras=True)
    texts: dict[str, str] = {}
    for base in reversed(command.__mro__):
        parsed = docstring_parser.parse(base.__doc__ or "")
        texts |= {parameter.arg_name: parameter.description or "" for parameter in parsed.params}
    return {
        each.name: Option(each.name, kinds[each.name], _default(each), " ".join(texts.get(each.name, "").split()))
        for each in fields(command)
        if each.init and each.name not in getattr(command, "HIDDEN", ())
    }


def method_options(method: Method) -> dict[str, Option]:
    """The options of a method, documented in the docstrings of its factories.

    Raises:
      ValueError: its factory is not of the form that a method has.
    """
    found = {}
    for name, parameter in method.options.items():
        factory = method.owner(name)
        try:
            hints = get_type_hints(factory, include_extras=True)
            json.dumps(parameter.default)
        except Exception as error:
            raise ParameterError(
                "algorithm",
                f"{method.name} has an option {name} that cannot be one: its annotation must be a type, "
                f"its default a number, a text or a bool ({error})",
            ) from error
        parsed = docstring_parser.parse(factory.__doc__ or "")
        texts = {each.arg_name: each.description or "" for each in parsed.params}
        without = str | None if parameter.default is None else type(parameter.default)
        kind = hints.get(name, without)
        found[name] = Option(name, kind, parameter.default, " ".join(texts.get(name, "").split()))
    return found


def is_foreign(name: str) -> bool:
    """Whether a method's code comes from a file or module that its name points at."""
    return ":" in name


def methods_of(names: Sequence[str]) -> dict[str, Method]:
    """Methods by their names.

    Raises:
      ValueError: there is none of a name, or an option means two things.
    """
    methods = {name: algorithms.load(name) for name in names}
    kinds: dict[str, tuple[str, Any]] = {}
    for name, method in methods.items():
        for option in method_options(method).values():
            other, kind = kinds.setdefault(option.name, (name, option.kind))
            if kind != option.kind:
                raise ParameterError("algorithms", f"must agree on what {option.name} is; {other} and {name} do not")
    return methods


def shared_options(methods: Sequence[Method]) -> dict[str, Option]:
    """The options of several methods; one that they have different defaults of is None unless it is given."""
    found: dict[str, Option] = {}
    for method in methods:
        for name, option in method_options(method).items():
            known = found.setdefault(name, option)
            if known.default != option.default:
                own = "by default each method's own"
                found[name] = Option(name, known.kind | None, None, f"{known.text} ({own})")
    return found


def options_with(command: type, methods: Sequence[Method]) -> type:
    """The dataclass of a command with the options of its methods.

    Raises:
      ValueError: a method has an option that the command has, too.
    """
    own, added = own_options(command), shared_options(methods)
    for name in added:
        if name in own or name in RESERVED:
            owner = next(method.name for method in methods if name in method.options)
            raise ParameterError(
                "algorithm", f"{owner} has an option {name}, which is the command's own; it must have another name"
            )
    listed = [(option.name, option.kind, field(default=option.default)) for option in added.values()]
    return make_dataclass(command.__name__, listed, bases=(command,), frozen=True, kw_only=True)


def given_to(method: Method, options: Any) -> dict[str, Any]:
    """Those of ``options`` that are the method's; the others, and those that are None, are its defaults."""
    given = {name: getattr(options, name, None) for name in method.options}
    return {name: value for name, value in given.items() if value is not None}
