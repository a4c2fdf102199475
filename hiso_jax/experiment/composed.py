"""The options of a command, composed from its own and from those of what is chosen with it."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, make_dataclass, replace
from functools import cache
from typing import Any, get_type_hints

from hiso_jax import algorithms
from hiso_jax.algorithms import Method
from hiso_jax.availabilities import AVAILABILITIES
from hiso_jax.checks import ParameterError
from hiso_jax.choices import Choice, Kind, Option, shared_options, texts_of
from hiso_jax.partitions import PARTITIONS
from hiso_jax.samplers import SAMPLERS
from hiso_jax.schedules import SCHEDULES
from hiso_jax.tasks.named import TASKS
from hiso_jax.tasks.trainables import TRAINABLES

# --help answers to them.
RESERVED = ("help", "h")
# Each is chosen by the option of its name; algorithms are chosen beside them, see ``Method``.
KINDS: dict[str, Kind] = {kind.name: kind for kind in (TASKS, PARTITIONS, AVAILABILITIES, SCHEDULES)}
# Each is chosen by an option of another choice, of methods and of tasks.
NESTED: dict[str, Kind] = {kind.name: kind for kind in (SAMPLERS, TRAINABLES)}


def _default(of: Field) -> Any:
    return of.default_factory() if of.default_factory is not MISSING else of.default


@cache
def own_options(command: Any) -> dict[str, Option]:
    """The options of a command's dataclass, documented in its docstring or in those of its bases."""
    kinds = get_type_hints(command, include_extras=True)
    texts: dict[str, str] = {}
    for base in reversed(command.__mro__):
        texts |= texts_of(base)
    return {
        each.name: Option(each.name, kinds[each.name], _default(each), texts.get(each.name, ""))
        for each in fields(command)
        if each.init and each.name not in getattr(command, "HIDDEN", ())
    }


def methods_of(names: Sequence[str]) -> dict[str, Method]:
    """Methods by their names.

    Raises:
      ParameterError: there is none of a name, or an option means two things.
    """
    methods = {name: algorithms.load(name) for name in names}
    kinds: dict[str, tuple[str, Any]] = {}
    for name, method in methods.items():
        for option in method.options.values():
            other, kind = kinds.setdefault(option.name, (name, option.kind))
            if kind != option.kind:
                raise ParameterError("algorithm", f"{name} and {other} must agree on what {option.name} is, and do not")
    return methods


def options_of_methods(methods: Sequence[Method]) -> dict[str, Option]:
    """The options of several methods; one that they have different defaults of is None unless it is given."""
    found: dict[str, Option] = {}
    for method in methods:
        for name, option in method.options.items():
            known = found.setdefault(name, option)
            if known.default != option.default:
                own = "by default each method's own"
                found[name] = Option(name, known.kind | None, None, f"{known.text} ({own})")
    return found


def nested_choices(methods: Sequence[Method], choices: Sequence[Choice], names: Mapping[str, Any]) -> list[Choice]:
    """What is chosen by options of methods and choices: as ``names`` have it, or as their defaults have it.

    Raises:
      ParameterError: there is no such choice.
    """
    found: list[Choice] = []
    for kind, nested in NESTED.items():
        owners: list[Method | Choice] = [*methods, *choices]
        defaults: list[Any] = [owner.options[kind].default for owner in owners if kind in owner.options]
        if names.get(kind) is not None and defaults:
            defaults = [names[kind]]
        loaded = [each if isinstance(each, Choice) else nested.load(each) for each in defaults if each is not None]
        found += {choice.name: choice for choice in loaded}.values()
    return found


def chosen_options(methods: Sequence[Method], choices: Sequence[Choice]) -> dict[str, Option]:
    """The options of all that is chosen, with their own defaults.

    Raises:
      ParameterError: two choices declare an option of one name differently.
    """
    found = options_of_methods(methods)
    for name, option in shared_options(choices).items():
        known = found.setdefault(name, option)
        if (known.kind, known.default) != (option.kind, option.default):
            owner = next(choice for choice in choices if name in choice.options)
            method = next(method.name for method in methods if name in method.options)
            raise ParameterError(
                owner.kind.name, f"{owner.name} and algorithm {method} must agree on what {name} is, and do not"
            )
    # A name, which may be of a file of the user's.
    plain = {name: replace(option, kind=str | None) for name, option in found.items() if name in NESTED}
    return found | plain


def options_with(command: type, methods: Sequence[Method], choices: Sequence[Choice] = ()) -> type:
    """The dataclass of a command with the options of what is chosen with it.

    Raises:
      ParameterError: a choice has an option that the command has, too.
    """
    own, added = own_options(command), chosen_options(methods, choices)
    for name in added:
        if name in own or name in RESERVED:
            owners = [("algorithm", method.name) for method in methods if name in method.options]
            owners += [(choice.kind.name, choice.name) for choice in choices if name in choice.options]
            kind, owner = owners[0]
            raise ParameterError(
                kind, f"{owner} has an option {name}, which is the command's own; it must have another name"
            )
    listed = [(option.name, option.kind, field(default=option.default)) for option in added.values()]
    return make_dataclass(command.__name__, listed, bases=(command,), frozen=True, kw_only=True)


def choice_of(kind: str, options: Any) -> Choice:
    """The choice of a kind that options name."""
    chosen = getattr(options, kind)
    return chosen if isinstance(chosen, Choice) else KINDS[kind].load(chosen)


def given_to(chosen: Method | Choice, options: Any) -> dict[str, Any]:
    """Those of ``options`` that a choice has; the others, and those that are None, are its defaults."""
    given = {name: getattr(options, name, None) for name in chosen.options}
    for kind, nested in NESTED.items():
        name = given.get(kind)
        if isinstance(name, str):
            given[kind] = nested.load(name).build(vars(options))
    return {name: value for name, value in given.items() if value is not None}
