"""The options of a command: its own, and those of the chosen methods, tasks, partitions and so on."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, make_dataclass, replace
from functools import cache
from typing import Any, get_type_hints

from hiso_jax import algorithms
from hiso_jax.algorithms import Method
from hiso_jax.availabilities import AVAILABILITIES
from hiso_jax.checks import ParameterError
from hiso_jax.choices import Choice, Kind, Option, shared_options, texts_of
from hiso_jax.fed.task_checks import check_given
from hiso_jax.objectives import OBJECTIVES
from hiso_jax.partitions import PARTITIONS
from hiso_jax.renamed import IN_FILES
from hiso_jax.samplers import SAMPLERS
from hiso_jax.schedules import SCHEDULES
from hiso_jax.selections import SELECTIONS
from hiso_jax.tasks.named import TASKS
from hiso_jax.tasks.trainables import TRAINABLES

# Names of --help and --help-all, and names that options have in files, under which no other option can be kept.
RESERVED = ("help", "help_all", "h", *IN_FILES.values())
# The option of the same name chooses each kind; algorithms are chosen separately, see ``Method``.
KINDS: dict[str, Kind] = {
    kind.name: kind for kind in (TASKS, PARTITIONS, SELECTIONS, AVAILABILITIES, SCHEDULES, OBJECTIVES)
}
# An option of a method or a task chooses each of these kinds.
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
      ParameterError: a name is unknown, or two methods define an option differently.
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
    """The options of several methods; an option with different defaults is None unless it is given."""
    found: dict[str, Option] = {}
    for method in methods:
        for name, option in method.options.items():
            known = found.setdefault(name, option)
            if known.default != option.default:
                own = "by default each method's own"
                found[name] = Option(name, known.kind | None, None, f"{known.text} ({own})")
    return found


def nested_choices(methods: Sequence[Method], choices: Sequence[Choice], names: Mapping[str, Any]) -> list[Choice]:
    """The choices made by options of methods and other choices: from ``names``, or else from the defaults.

    Raises:
      ParameterError: a name is unknown.
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
    """The options of all methods and choices, with their own defaults.

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
    # Given as a name, which may point to a user's file.
    plain = {name: replace(option, kind=str | None) for name, option in found.items() if name in NESTED}
    return found | plain


def options_with(command: type, methods: Sequence[Method], choices: Sequence[Choice] = ()) -> type:
    """The dataclass of a command with the options of the methods and choices added.

    Raises:
      ParameterError: a choice has an option with the name of a command's option.
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
    """The choice of a kind in ``options``, loaded if it is a name."""
    chosen = getattr(options, kind)
    return chosen if isinstance(chosen, Choice) else KINDS[kind].load(chosen)


def as_choice(task: Any) -> Any:
    """A task that is given as a value, as a choice; a name stays a name."""
    if isinstance(task, str | Choice):
        return task
    check_given(task)
    return Choice(KINDS["task"], str(getattr(task, "name", type(task).__name__)), lambda: task)


def given_to(chosen: Method | Choice, options: Any) -> dict[str, Any]:
    """The entries of ``options`` that a choice has and that are not None; its defaults replace the others."""
    given = {name: getattr(options, name, None) for name in chosen.options}
    for kind, nested in NESTED.items():
        name = given.get(kind)
        if isinstance(name, str):
            given[kind] = nested.load(name).build(vars(options))
    return {name: value for name, value in given.items() if value is not None}
