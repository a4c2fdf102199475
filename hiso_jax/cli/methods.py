"""The options of a command, composed from its own and from those of the methods that it is asked for."""

from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from functools import cache
from typing import Any, get_type_hints

import docstring_parser

from hiso_jax import algorithms
from hiso_jax.algorithms import Method


@dataclass(frozen=True)
class Option:
    """An option as a command line has it.

    Attributes:
      name: of the field.
      kind: its type, with what tyro is told of it.
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
        if each.init
    }


def method_options(method: Method) -> dict[str, Option]:
    """The options of a method, documented in the docstrings of its factories.

    Raises:
      ValueError: its factory is not of the form that a method has.
    """
    found = {}
    for name, parameter in method.options.items():
        factory = method.owner(name)
        parsed = docstring_parser.parse(factory.__doc__ or "")
        texts = {each.arg_name: each.description or "" for each in parsed.params}
        kind = get_type_hints(factory, include_extras=True).get(name, type(parameter.default))
        found[name] = Option(name, kind, parameter.default, " ".join(texts.get(name, "").split()))
    return found


def is_foreign(name: str) -> bool:
    """Whether a method's code comes from a file or module that its name points at."""
    return ":" in name.split("+")[0]


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
                raise ValueError(f"algorithms must agree on what {option.name} is; {other} and {name} do not")
    return methods


def options_with(command: type, methods: Sequence[Method]) -> type:
    """The dataclass of a command with the options of its methods, where they are not its own.

    An option of several methods has the default of the first.
    """
    own = own_options(command)
    added: dict[str, Option] = {}
    for method in methods:
        for option in method_options(method).values():
            if option.name not in own:
                added.setdefault(option.name, option)
    listed = [(option.name, option.kind, field(default=option.default)) for option in added.values()]
    return make_dataclass(command.__name__, listed, bases=(command,), frozen=True, kw_only=True)


def given_to(method: Method, options: Any) -> dict[str, Any]:
    """Those of ``options`` that are the method's; the others are its defaults."""
    return {name: getattr(options, name) for name in method.options if hasattr(options, name)}
