"""From words to options: the command's, and those of what is chosen with it."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field, make_dataclass, replace
from typing import Any

from hiso_jax import algorithms, channels
from hiso_jax.checks import ParameterError
from hiso_jax.choices import Choice, Option, is_foreign
from hiso_jax.cli.arguments import as_typed, peek, read
from hiso_jax.cli.exit_codes import UsageError
from hiso_jax.cli.methods import KINDS, chosen_options, methods_of, options_with, own_options, task_defaults
from hiso_jax.cli.options import GROUPS, MOVABLE, MOVED, Experiment
from hiso_jax.cli.unread import check_read

PROGRAM = "hiso-jax"
# They decide which other options there are.
DECIDING = (*KINDS, "algorithm", "algorithms", "schedules", "combine", "attack", "resume")
# Owners of an option that are named before the others are counted.
NAMED = 4


def _grouped(
    own: Collection[str],
    flat: Mapping[str, Option],
    methods: Sequence[algorithms.Method],
    choices: Sequence[Choice],
) -> dict[str, Any]:
    """The options by the headings of --help; ``own`` are the names of the command's own."""
    groups: dict[str, list[Option]] = {}
    for place, (title, names) in enumerate(GROUPS.items()):
        groups[f"{title} options"] = [flat[name] for name in names if name in own and name in flat]
        if place == 0:
            known = {*own}
            chosen = [(method.title, method.options) for method in methods]
            for heading, options in [*chosen, *((f"{each.kind.name} {each.name}", each.options) for each in choices)]:
                groups[f"{heading} options"] = [flat[name] for name in options if name not in known]
                known |= {*options}
    known = {option.name for each in groups.values() for option in each}
    rest = [option for name, option in flat.items() if name not in known]
    return {title: options for title, options in [*groups.items(), ("other options", rest)] if options}


def _choices(own: Mapping[str, Option], words: Mapping[str, str]) -> list[Choice]:
    """What is chosen: as it is given, or as the task has it by default, or as the command has it.

    Raises:
      ParameterError: there is no such choice.
    """
    task = KINDS["task"].load(words.get("task", own["task"].default))
    found = [task]
    for name, kind in KINDS.items():
        if name != "task" and name in own:
            found.append(kind.load(words.get(name, task.defaults.get(name, own[name].default))))
    if "schedules" in own:
        several = task.defaults.get("schedules", own["schedules"].default)
        several = words["schedules"].split(",") if "schedules" in words else several
        found += [KINDS["schedule"].load(name.strip()) for name in dict.fromkeys(several)]
    return found


def _asked_for(own: Mapping[str, Option], words: Mapping[str, str]) -> list[str]:
    """The names of the methods that a command is asked for."""
    if "algorithms" in own:
        given = words.get("algorithms")
        return list(own["algorithms"].default) if given is None else [name.strip() for name in given.split(",")]
    return [words.get("algorithm", own["algorithm"].default)]


def _channels(words: Mapping[str, str]) -> str:
    """What ``--combine`` and ``--attack`` add to a method's name, of which channels are a part.

    Raises:
      ParameterError: there is no such channel.
    """
    # The guard has an option of its own.
    shorten = tuple(name for name in channels.names_of("combine", "rescale") if name != "guard")
    allowed = {"combine": shorten, "attack": channels.names_of("attack")}
    added = ""
    for option, names in allowed.items():
        for name in words[option].split("+") if option in words else ():
            if name not in names:
                raise ParameterError(option, f"must be one of {', '.join(names)}, got {name!r}")
            added += f"+{name}"
    return added


def _through(values: Mapping[str, Any], asked: Sequence[str], added: str) -> dict[str, Any]:
    """The values with channels as a part of the methods' names; ``asked`` are the names as they were typed."""

    def renamed(word: str) -> str:
        name, equals, rate = word.partition("=")
        return f"{name.strip()}{added}{equals}{rate}" if name.strip() in asked else word

    named = [f"{name}{added}" for name in asked]
    changed: dict[str, Any] = {"combine": None, "attack": None}
    if "algorithms" not in values:
        return {**values, **changed, "algorithm": named[0]}
    changed["algorithms"] = tuple(named)
    if values["learning_rate"] is not None:
        changed["learning_rate"] = tuple(map(renamed, values["learning_rate"]))
    if values.get("baseline") is not None:
        changed["baseline"] = renamed(values["baseline"])
    return {**values, **changed}


def _check_known(
    command: str,
    rest: Sequence[str],
    known: Collection[str],
    asked: Sequence[str] = (),
    choices: Sequence[Choice] = (),
) -> None:
    """Refuse words that neither the command nor what is chosen with it knows, and say where they belong.

    Raises:
      UsageError: there is one.
    """
    if not rest:
        return
    name = _named(rest[0])
    if name is None:
        raise UsageError(f"{rest[0]!r} is no option of {command} (see --help for what there is)")
    for choice in choices:
        owners = choice.kind.owners(name)
        if owners:
            kind = as_typed(choice.kind.name)
            raise UsageError(
                f"{as_typed(name)} is an option of {kind} {_listed(owners)}; it would have no effect with {kind} "
                f"{choice.name}"
            )
    through = [each for each in channels.NAMES if asked and name in algorithms.load(f"decomfl+{each}").options]
    through = [] if name in algorithms.load("decomfl").options else through
    owners = algorithms.ALGORITHMS.owners(name) if asked else []
    if through and not owners:
        several = f"the channels {', '.join(through)}" if len(through) > 1 else f"the channel {through[0]}"
        raise UsageError(
            f"{as_typed(name)} is an option of {several}, which {asked[0]}+{through[0]}, say, goes through"
        )
    if owners:
        raise UsageError(
            f"{as_typed(name)} is an option of {', '.join(owners)}; it would have no effect on {', '.join(asked)}"
        )
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {as_typed(near[0])}?" if near else " (see --help for what there is)"
    raise UsageError(f"{as_typed(name)} is no option of {command}{hint}")


def _listed(names: Sequence[str]) -> str:
    """Names in a sentence; of many the first, and how many there are beside them."""
    few = names if len(names) <= NAMED else names[: NAMED - 1]
    return ", ".join(few) + (f" and {len(names) - len(few)} more" if len(few) < len(names) else "")


def _named(word: str) -> str | None:
    """The name of the option that a word is, None if it is a value."""
    return word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else None


def _resumed(kind: Any, command: str, words: Sequence[str]) -> Any:
    """The options of a command that goes on with what is in a directory, which has all others.

    Raises:
      ParameterError: another option is given.
    """
    own = own_options(kind)
    moved = {name: Option(name, each, None, "where it is now") for name, each in MOVED.items() if command == "run"}
    movable = MOVABLE if command == "run" else {"resume"}
    # What is the user's own has to be named again: no code is run because a directory names it.
    again = ("algorithm", *KINDS)
    flat = {name: option for name, option in own.items() if name in movable or name in again} | moved
    given, rest = read(f"{PROGRAM} {command}", "", {"options": list(flat.values())}, words)
    unmoved = [name for name in given if name in again and not is_foreign(given[name])]
    for name in [*unmoved, *map(_named, rest)]:
        if name is not None:
            raise ParameterError(name, "cannot be given with --resume: the run has its own")
    _check_known(command, rest, flat)
    extra = [(option.name, option.kind, field(default=None)) for option in moved.values()]
    return make_dataclass(kind.__name__, extra, bases=(kind,), frozen=True, kw_only=True)(**given)


def _with_other_defaults(option: Option) -> Option:
    """An option whose --help tells the default that it has with text tasks."""
    others = {str(each.defaults[option.name]) for each in map(KINDS["task"].load, KINDS["task"].factories)
              if option.name in each.defaults}  # fmt: skip
    if len(others) != 1:
        return option
    return replace(option, text=f"{option.text.removesuffix('.')}. For text tasks by default {others.pop()}.")


def parse(kind: Any, command: str, words: Sequence[str]) -> Any:
    """The options of a command.

    Args:
      kind: its dataclass.
      command: its name.
      words: what follows it.

    Raises:
      ParameterError: an option is out of range, or would have no effect.
      UsageError: the words are not its options.
    """
    own = own_options(kind)
    program, about = f"{PROGRAM} {command}", (kind.__doc__ or "").split("\n\n")[0]
    if not issubclass(kind, Experiment):
        given, rest = read(program, about, {"options": list(own.values())}, words)
        _check_known(command, rest, own)
        return kind(**given)
    chosen = peek(words, DECIDING)
    if "resume" in chosen:
        return _resumed(kind, command, words)
    added, typed = _channels(chosen), _asked_for(own, chosen)
    asked = [f"{name}{added}" for name in typed]
    methods, choices = list(methods_of(asked).values()), _choices(own, chosen)
    whole = options_with(kind, methods, choices)
    flat = own_options(whole) | chosen_options(methods, choices) | own
    if any(method.is_private for method in methods) and "direction_groups" in flat:
        # Several groups are asked for, or there is one: see ``Method.build``.
        flat["direction_groups"] = replace(flat["direction_groups"], default="shared")
    if "task" in chosen:
        flat |= {name: replace(flat[name], default=value) for name, value in task_defaults(choices[0], flat).items()}
        shown = flat
    else:
        shown = {name: _with_other_defaults(option) for name, option in flat.items()}
    given, rest = read(program, about, _grouped(own, shown, methods, choices), words)
    _check_known(command, rest, flat, asked, choices)
    values = {name: option.default for name, option in flat.items()} | given
    options = whole(**(_through(values, typed, added) if added else values))
    check_read(options, methods, given)
    return options
