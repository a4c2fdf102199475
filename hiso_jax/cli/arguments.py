"""Options as argparse arguments: their types, their help, and a one-sentence error for an invalid value."""

import argparse
import copy
import shutil
import textwrap
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hiso_jax.checks import ParameterError, did_you_mean
from hiso_jax.choices import Listed, Option, is_foreign
from hiso_jax.cli.errors import UsageError
from hiso_jax.cli.options import GROUPS, MOVABLE, MOVED
from hiso_jax.experiment import DECIDING, KINDS, NESTED, Resolved, Settings, every_option, own_options, resolve, unknown

# Maximum width of the help, and of a list of choices that is shown beside its option's name.
WIDTH, BESIDE = 100, 40
NUMBERS = {float: "a number", int: "an integer"}
METAVARS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


class Positional:
    """Marks the annotation of a positional argument."""


def _members(kind: Any) -> list[Any]:
    """The types and marks in an annotation; NoneType is among them if the option may be None."""
    if get_origin(kind) is Annotated:
        inner, *marks = get_args(kind)
        listed = [mark for mark in marks if isinstance(mark, Listed)]
        return [*(listed or _members(inner)), *([type(None)] if listed and type(None) in _members(inner) else [])]
    if get_origin(kind) in (Union, types.UnionType):
        return [each for member in get_args(kind) for each in _members(member)]
    return [kind]


def is_positional(option: Option) -> bool:
    """Whether an option is a positional argument."""
    return get_origin(option.kind) is Annotated and Positional in get_args(option.kind)


def _item(kind: Any) -> Any:
    """The type of each word of an argument that takes several; any other type is its own."""
    return get_args(kind)[0] if get_origin(kind) is tuple else kind


def _is_flag(option: Option) -> bool:
    return {*_members(option.kind)} - {type(None)} == {bool}


def _as_member(kind: Any, word: str) -> Any:
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if str(choice) == word)
    return kind.read(word) if isinstance(kind, Listed) else kind(word)


def read_word(option: Option, word: str) -> Any:
    """The value of an option, read from a word.

    Raises:
      ParameterError: the word is not a valid value of the option.
    """
    kinds = [_item(kind) for kind in _members(option.kind) if kind is not type(None)]
    if word == "None" and len(kinds) < len(_members(option.kind)):
        return None
    for kind in kinds:
        try:
            return _as_member(kind, word)
        except (ValueError, StopIteration):
            continue
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    valid = [NUMBERS[kind] for kind in kinds if kind in NUMBERS]
    valid += [
        f"{NUMBERS[kind.convert].partition(' ')[2]}s, comma-separated" for kind in kinds if isinstance(kind, Listed)
    ]
    valid += [f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]] if choices else []
    raise ParameterError(option.name, f"must be {' or '.join(valid)}, got {word!r}{did_you_mean(word, choices)}")


class _Value(argparse.Action):
    """Stores the value of an option; if the option is given several times, the last value counts."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, option: Option, **more: Any) -> None:
        super().__init__(option_strings, dest, **more)
        self.option = option

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Read the word and store its value.

        Raises:
          ParameterError: the word is not a valid value of the option.
        """
        several = isinstance(values, list)
        read = tuple(read_word(self.option, word) for word in values) if several else read_word(self.option, values)
        setattr(namespace, self.dest, read)


class _Formatter(argparse.HelpFormatter):
    """Help as wide as the terminal, up to ``WIDTH``; each option's text stands below its name."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=8, width=min(WIDTH, shutil.get_terminal_size().columns - 2))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # An option may be typed with underscores, too, as its parameter is named; help shows only the name with dashes.
        shown = copy.copy(action)
        shown.option_strings = [name for name in action.option_strings if "_" not in name]
        return super()._format_action_invocation(shown)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """Raise one sentence in place of argparse's usage.

        Raises:
          UsageError: always.
        """
        raise UsageError(message)


def as_typed(name: str) -> str:
    """The name of an option as it is typed, with dashes."""
    return f"--{name.replace('_', '-')}"


def _metavar(option: Option) -> str:
    kinds = [kind for kind in _members(option.kind) if kind is not type(None)]
    shown = [
        f"{{{','.join(map(str, get_args(kind)))}}}" if get_origin(kind) is Literal
        else kind.metavar if isinstance(kind, Listed) else METAVARS.get(kind, "VALUE")
        for kind in kinds
    ]  # fmt: skip
    beside = "|".join(shown)
    return beside if len(beside) <= BESIDE else option.name.upper()


def _help(option: Option) -> str:
    default, choices = option.default, [kind for kind in _members(option.kind) if get_origin(kind) is Literal]
    text = option.text.removesuffix(".")
    if choices and _metavar(option) == option.name.upper():
        text += f". One of {', '.join(str(choice) for kind in choices for choice in get_args(kind))}"
    if default not in (None, ()) and default is not False and not is_positional(option):
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text += f" (default: {shown})"
    return text.replace("%", "%%")


def _add(parser: Any, option: Option) -> None:
    names = dict.fromkeys([as_typed(option.name), f"--{option.name}"])
    if is_positional(option):
        several = "+" if tuple in {get_origin(kind) for kind in _members(option.kind)} else None
        name = option.name.upper()
        parser.add_argument(option.name, action=_Value, nargs=several, option=option, metavar=name, help=_help(option))
    elif _is_flag(option):
        flag = argparse.BooleanOptionalAction
        parser.add_argument(*names, dest=option.name, action=flag, help=_help(option))
    else:
        parser.add_argument(
            *names, dest=option.name, action=_Value, option=option, metavar=_metavar(option),
            help=_help(option),
        )  # fmt: skip


def peek(words: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """The words given for some options, which decide which other options exist."""
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in names:
        parser.add_argument(*dict.fromkeys([as_typed(name), f"--{name}"]), dest=name, nargs="?")
    return {name: word for name, word in vars(parser.parse_known_args(words)[0]).items() if word is not None}


def read(
    program: str, about: str, groups: Mapping[str, Sequence[Option]], words: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """The values of the options in ``words``, and the words that belong to no option.

    Args:
      program: name of the command.
      about: one sentence about the command.
      groups: the command's options, by the headings under which --help-all shows them.
      words: the words after the command.

    Raises:
      ParameterError: an option has an invalid value.
      UsageError: a required argument is missing, an option lacks its value, or a flag has one.
    """
    parser = _Parser(
        program, f"{program} [OPTIONS]", about, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        exit_on_error=False, formatter_class=_Formatter,
    )  # fmt: skip
    parser.add_argument("--help-all", action="help", help=argparse.SUPPRESS)
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        for option in options:
            _add(group, option)
    try:
        found, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        # This module reads the values, so the error left is an option without a value, or a flag with one.
        name = str(error.argument_name)
        if "/" in name:
            raise UsageError(f"{name} takes no value") from None
        raise UsageError(f"{name} must have a value; one that begins with a dash is written {name}=VALUE") from None
    return vars(found), rest


PROGRAM = "hiso-jax"
ADVICE = " (see --help-all for the options)"


def _grouped(own: Collection[str], flat: Mapping[str, Option], resolved: Resolved) -> dict[str, Any]:
    """The options by the headings of --help-all; ``own`` are the names of the command's own options."""
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
        raise UsageError(f"{word!r} is no option of {command}; a list is written with commas, A,B{ADVICE}")
    return name


def _resumed(kind: Any, command: str, words: Sequence[str]) -> Any:
    """The options given with --resume, and their names as ``given``; the directory records all others.

    Raises:
      ParameterError: an option is given that the directory records, or that does not exist.
    """
    own = own_options(kind)
    moved = {name: Option(name, each, None, "where it is now") for name, each in MOVED.items() if command == "run"}
    movable = MOVABLE if command == "run" else {"resume"}
    # User code has to be named again: no code is run because a directory names it.
    again = ("algorithm", "algorithms", "schedules", *KINDS, *NESTED)
    moved |= {kind: Option(kind, str | None, None, "FILE:NAME of the user's own again") for kind in NESTED}
    flat = {name: option for name, option in own.items() if name in movable or name in again} | moved
    given, rest = read(f"{PROGRAM} {command}", "", {"options": list(flat.values())}, words)
    for name in [_name_of(command, word) for word in rest[:1]]:
        known = {*own, *NESTED} | every_option()
        if name not in known:
            raise _as_typed(unknown(name, command, dict.fromkeys(known), ADVICE))

    def is_own(value: Any) -> bool:
        return any(map(is_foreign, value if isinstance(value, tuple) else [value]))

    unmoved = [name for name in given if name in again and not is_own(given[name])]
    for name in [*unmoved, *(_name_of(command, word) for word in rest[:1])]:
        raise ParameterError(name, "cannot be given with --resume: the run has its own")
    extra: list[Any] = [(option.name, option.kind, field(default=None)) for option in moved.values()]
    extra.append(("given", tuple, field(default=())))
    return make_dataclass(kind.__name__, extra, bases=(kind,), frozen=True, kw_only=True)(**given, given=tuple(given))


def _with_other_defaults(option: Option) -> Option:
    """An option whose --help-all also gives its default for text tasks, if they have one."""
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
