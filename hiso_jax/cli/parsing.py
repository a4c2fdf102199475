"""From words to options: the command's and those of the methods that it is asked for."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from hiso_jax import algorithms, channels
from hiso_jax.checks import ParameterError
from hiso_jax.cli.arguments import as_typed, peek, read
from hiso_jax.cli.exit_codes import UsageError
from hiso_jax.cli.heeded import check_heeded
from hiso_jax.cli.language import GENERATES, TEXT_TASK_NAMES
from hiso_jax.cli.methods import Option, is_foreign, methods_of, options_with, own_options, shared_options
from hiso_jax.cli.options import GROUPS, MOVABLE, TEXT_DEFAULTS, Experiment

PROGRAM = "hiso-jax"
# They decide which other options there are.
DECIDING = ("algorithm", "algorithms", "task", "combine", "attack", "resume")


def _grouped(own: Collection[str], flat: Mapping[str, Option], methods: Sequence[algorithms.Method]) -> dict[str, Any]:
    """The options by the headings of --help; ``own`` are the names of the command's own."""
    groups: dict[str, list[Option]] = {}
    for place, (title, names) in enumerate(GROUPS.items()):
        groups[f"{title} options"] = [flat[name] for name in names if name in own and name in flat]
        for method in methods if place == 0 else ():
            known = {*own, *(option.name for each in groups.values() for option in each)}
            groups[f"{method.title} options"] = [flat[name] for name in method.options if name not in known]
    known = {option.name for each in groups.values() for option in each}
    rest = [option for name, option in flat.items() if name not in known]
    return {title: options for title, options in [*groups.items(), ("other options", rest)] if options}


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


def _check_known(command: str, rest: Sequence[str], known: Collection[str], asked: Sequence[str] = ()) -> None:
    """Refuse words that neither the command nor its methods know, and say where they belong.

    Raises:
      UsageError: there is one.
    """
    for word in rest[:1]:
        name = _named(word)
        if name is None:
            raise UsageError(f"{word!r} is no option of {command} (see --help for what there is)")
        through = [each for each in channels.NAMES if asked and name in algorithms.load(f"decomfl+{each}").options]
        through = [] if name in algorithms.load("decomfl").options else through
        owners = [other for other in algorithms.NAMES if asked and name in algorithms.load(other).options]
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


def _named(word: str) -> str | None:
    """The name of the option that a word is, None if it is a value."""
    return word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else None


def _check_resumed(command: str, words: Mapping[str, str], given: Collection[str]) -> None:
    """Refuse, with --resume, what the run has of its own.

    Raises:
      ParameterError: it was given.
    """
    movable = MOVABLE if command == "run" else {"resume"}
    for name in given:
        if name not in movable and not (name == "algorithm" and is_foreign(words.get(name, ""))):
            raise ParameterError(name, "cannot be given with --resume: the run has its own")


def _text_defaults(flat: Mapping[str, Option], task: str | None, virtual: bool) -> dict[str, Option]:
    """The options that have other defaults where the task is one of text, or say so in --help where none is given."""
    if task is not None and task not in get_args(TEXT_TASK_NAMES):
        return {}
    # Generation has no labels and its own number of rows.
    unsuited = {"test_rows", "partition", "alpha"} if task in GENERATES else set()
    unsuited |= {"partition"} if virtual else set()
    own = {name: value for name, value in TEXT_DEFAULTS.items() if name in flat and name not in unsuited}
    if task is not None:
        return {name: replace(flat[name], default=value) for name, value in own.items()}
    return {
        name: replace(flat[name], text=f"{flat[name].text.removesuffix('.')}. For tasks of text by default {value}.")
        for name, value in own.items()
    }


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
    added, typed = "" if "resume" in chosen else _channels(chosen), _asked_for(own, chosen)
    asked = [f"{name}{added}" for name in typed]
    methods = list(methods_of(asked).values())
    whole = options_with(kind, methods)
    flat = own_options(whole) | shared_options(methods) | own
    if any(method.is_private for method in methods) and "direction_groups" in flat:
        # Several groups are asked for, or there is one: see ``Method.build``.
        flat["direction_groups"] = replace(flat["direction_groups"], default="shared")
    shown = flat | _text_defaults(flat, chosen.get("task"), virtual=False)
    given, rest = read(program, about, _grouped(own, shown, methods), words)
    if "resume" in given:
        _check_resumed(command, chosen, [*given, *filter(None, map(_named, rest))])
    _check_known(command, rest, flat, asked)
    if "task" in given:
        flat |= _text_defaults(flat, given["task"], virtual="virtual" in given)
    values = {name: option.default for name, option in flat.items()} | given
    options = whole(**(_through(values, typed, added) if added else values))
    check_heeded(options, methods, given)
    return options
