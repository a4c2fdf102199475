"""From words to options: those of the command, and those of the factories chosen with it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import field, make_dataclass, replace
from typing import Any

from hiso_jax.checks import ParameterError
from hiso_jax.choices import Option, is_foreign
from hiso_jax.cli.arguments import as_typed, peek, read
from hiso_jax.cli.errors import UsageError
from hiso_jax.cli.options import GROUPS, MOVABLE, MOVED
from hiso_jax.experiment import DECIDING, KINDS, NESTED, Resolved, Settings, own_options, resolve, unknown

PROGRAM = "hiso-jax"
ADVICE = " (see --help for the options)"


def _grouped(own: Collection[str], flat: Mapping[str, Option], resolved: Resolved) -> dict[str, Any]:
    """The options by the headings of --help; ``own`` are the names of the command's own options."""
    groups: dict[str, list[Option]] = {}
    for place, (title, names) in enumerate(GROUPS.items()):
        groups[f"{title} options"] = [flat[name] for name in names if name in own and name in flat]
        if place == 0:
            known = {*own}
            chosen = [(method.title, method.options) for method in resolved.methods]
            chosen += [(f"{each.kind.name} {each.name}", each.options) for each in resolved.choices]
            for heading, options in chosen:
                groups[f"{heading} options"] = [flat[name] for name in options if name not in known]
                known |= {*options}
    known = {option.name for each in groups.values() for option in each}
    rest = [option for name, option in flat.items() if name not in known]
    return {title: options for title, options in [*groups.items(), ("other options", rest)] if options}


def _named(word: str) -> str | None:
    """The name of the option that a word gives, or None if the word is a value."""
    return word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else None


def _name_of(command: str, word: str) -> str:
    """The name of the option that a word gives.

    Raises:
      UsageError: the word is a value that belongs to no option.
    """
    name = _named(word)
    if name is None:
        raise UsageError(f"{word!r} is no option of {command}{ADVICE}")
    return name


def _resumed(kind: Any, command: str, words: Sequence[str]) -> Any:
    """The options given with --resume; the directory records all others.

    Raises:
      ParameterError: an option is given that the directory records.
    """
    own = own_options(kind)
    moved = {name: Option(name, each, None, "where it is now") for name, each in MOVED.items() if command == "run"}
    movable = MOVABLE if command == "run" else {"resume"}
    # User code has to be named again: no code is run because a directory names it.
    again = ("algorithm", *KINDS, *NESTED)
    moved |= {kind: Option(kind, str | None, None, "FILE:NAME of the user's own again") for kind in NESTED}
    flat = {name: option for name, option in own.items() if name in movable or name in again} | moved
    given, rest = read(f"{PROGRAM} {command}", "", {"options": list(flat.values())}, words)
    unmoved = [name for name in given if name in again and not is_foreign(given[name])]
    for name in [*unmoved, *(_name_of(command, word) for word in rest[:1])]:
        raise ParameterError(name, "cannot be given with --resume: the run has its own")
    extra = [(option.name, option.kind, field(default=None)) for option in moved.values()]
    return make_dataclass(kind.__name__, extra, bases=(kind,), frozen=True, kw_only=True)(**given)


def _with_other_defaults(option: Option) -> Option:
    """An option whose --help also gives its default for text tasks, if they have one."""
    tasks = map(KINDS["task"].load, KINDS["task"].factories)
    others = {str(each.defaults[option.name]) for each in tasks if option.name in each.defaults}
    if len(others) != 1:
        return option
    return replace(option, text=f"{option.text.removesuffix('.')}. For text tasks by default {others.pop()}.")


def parse(kind: Any, command: str, words: Sequence[str]) -> Any:
    """The options of a command.

    Args:
      kind: the dataclass of the command's options.
      command: the name of the command.
      words: the words after the command.

    Raises:
      ParameterError: an option is out of range, or would have no effect.
      UsageError: the words do not match the command's options.
    """
    own = own_options(kind)
    program, about = f"{PROGRAM} {command}", (kind.__doc__ or "").split("\n\n")[0]
    if not issubclass(kind, Settings):
        given, rest = read(program, about, {"options": list(own.values())}, words)
        for word in rest:
            raise _as_typed(unknown(_name_of(command, word), command, own, ADVICE))
        return kind(**given)
    chosen = peek(words, [name for name in (*DECIDING, "resume") if name in own or name in NESTED])
    if "resume" in chosen:
        return _resumed(kind, command, words)
    resolved = resolve(kind, chosen)
    flat = resolved.options
    shown = flat if "task" in chosen else {name: _with_other_defaults(option) for name, option in flat.items()}
    given, rest = read(program, about, _grouped(own, shown, resolved), words)
    for word in rest:
        try:
            resolved.check_known(_name_of(command, word), command, ADVICE)
        except ParameterError as error:
            raise _as_typed(error) from None
        raise UsageError(f"{word} must be typed as {as_typed(_name_of(command, word))}")
    return resolved.settings(given)


def _as_typed(error: ParameterError) -> UsageError:
    """The error of an unknown option, with the option named as it was typed."""
    return UsageError(f"{as_typed(error.parameter)} {error.message}")
