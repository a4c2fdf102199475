"""From words to options: the command's and those of the methods it is asked for, and one line where that fails."""

import contextlib
import difflib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import field, make_dataclass, replace
from itertools import dropwhile, takewhile, zip_longest
from typing import Annotated, Any, get_args

import tyro

from hiso_jax import algorithms, channels
from hiso_jax.cli.choices import check_choices
from hiso_jax.cli.exit_codes import UsageError
from hiso_jax.cli.heeded import check_heeded
from hiso_jax.cli.language import GENERATES, TEXT_TASK_NAMES
from hiso_jax.cli.methods import RESERVED, Option, is_foreign, methods_of, options_with, own_options, shared_options
from hiso_jax.cli.options import GROUPS, MOVABLE, TEXT_DEFAULTS, Experiment

PROGRAM = "hiso-jax"
OPTION = re.compile(r"--([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)


def as_typed(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def option_words(words: Sequence[str]) -> dict[str, str | None]:
    """The options among some words, by their fields' names, each with the word behind it."""
    found: dict[str, str | None] = {}
    for word, following in zip_longest(words, words[1:]):
        match = OPTION.fullmatch(word)
        if match:
            found[match[1].replace("-", "_")] = match[2] if match[2] is not None else following
    return found


def one_line(report: str) -> str:
    """The message in tyro's boxed error report: what stands between its title and the next rule."""
    # The box is drawn in Unicode or, where the terminal cannot show that, with blanks and ASCII rules.
    lines = [line.strip("╭╮╰╯│─ ") for line in report.splitlines()]
    texts = ["" if set(line) <= {"-"} else line for line in lines]
    after_title = texts[1:] if texts and texts[0] else texts[2:]
    body = takewhile(bool, dropwhile(lambda text: not text, after_title))
    return re.sub(r"^Error parsing (\w+: )?", "", " ".join(body))


def _parsed(kind: type, command: str, words: Sequence[str]) -> Any:
    report = io.StringIO()
    try:
        with contextlib.redirect_stderr(report):
            return tyro.cli(kind, prog=f"{PROGRAM} {command}", args=words)
    except SystemExit as ending:
        if ending.code:
            raise UsageError(one_line(report.getvalue())) from None
        raise


def _grouped(command: type, flat: Mapping[str, Option], methods: Sequence[algorithms.Method]) -> type:
    """A dataclass for tyro with a field for each group of options, in the order of --help."""
    own = own_options(command)
    groups: dict[str, list[Option]] = {}
    for place, (title, names) in enumerate(GROUPS.items()):
        groups[title] = [flat[name] for name in names if name in own and name in flat]
        if place == 0:
            for method in methods:
                known = {*own, *(option.name for each in groups.values() for option in each)}
                groups[method.title] = [flat[name] for name in method.options if name not in known]
    known = {option.name for each in groups.values() for option in each}
    groups["other"] = [option for name, option in flat.items() if name not in known]
    listed = []
    for title, options in groups.items():
        if options:
            members = [
                (option.name, Annotated[option.kind, tyro.conf.arg(help=option.text)], field(default=option.default))
                for option in options
            ]
            group = make_dataclass(re.sub(r"\W", "_", title), members, kw_only=True)
            group.__doc__ = ""
            listed.append(
                (re.sub(r"\W", "_", title), tyro.conf.OmitArgPrefixes[group], field(default_factory=group))  # type: ignore[misc, valid-type]
            )
    whole = make_dataclass(command.__name__, listed, kw_only=True)
    whole.__doc__ = (command.__doc__ or "").split("\n\n")[0]
    return whole


def _asked_for(command: type, words: Mapping[str, str | None]) -> list[str]:
    """The names of the methods that a command is asked for."""
    own = own_options(command)
    if "algorithms" in own:
        given = words.get("algorithms")
        return list(own["algorithms"].default) if given is None else [name.strip() for name in given.split(",")]
    given = words.get("algorithm")
    return [own["algorithm"].default if given is None else given]


def _without(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """The words but for some options, each with what stands behind it."""
    kept, skip = [], False
    for word in words:
        match = OPTION.fullmatch(word)
        if match:
            named = match[1].replace("-", "_") in names
            skip = named and match[2] is None
            if named:
                continue
        elif skip:
            skip = False
            continue
        kept.append(word)
    return kept


def _through_channels(command: type, words: Sequence[str]) -> list[str]:
    """The words with ``--combine`` and ``--attack`` as a part of the methods' names, which they are.

    Raises:
      ValueError: there is no such channel.
    """
    given = option_words(words)
    # The guard has an option of its own.
    shorten = tuple(name for name in channels.names_of("combine", "rescale") if name != "guard")
    allowed = {"combine": shorten, "attack": channels.names_of("attack")}
    added = ""
    for option, names in allowed.items():
        through = given.get(option)
        for name in (through or "").split("+") if option in given else ():
            if name not in names:
                raise ValueError(f"{option} must be one of {', '.join(names)}, got {name!r}")
        added += f"+{through}" if option in given else ""
    if not added or "resume" in given:
        return list(words)
    asked = _asked_for(command, given)
    own = "algorithms" if "algorithms" in own_options(command) else "algorithm"
    rewritten = [*_without(words, (*allowed, own)), as_typed(own), ",".join(f"{name}{added}" for name in asked)]
    for option in ("learning_rate", "baseline"):
        # Which name the methods as they were typed.
        if given.get(option) and own == "algorithms":
            whole = ",".join(_with_channels(each, asked, added) for each in str(given[option]).split(","))
            rewritten = [*_without(rewritten, (option,)), as_typed(option), whole]
    return rewritten


def _with_channels(word: str, asked: Sequence[str], added: str) -> str:
    """``name`` or ``name=rate`` of a method that was asked for, with what was added to its name."""
    name, equals, rest = word.partition("=")
    return f"{name.strip()}{added}{equals}{rest}" if name.strip() in asked else word


def _check_known(command: str, words: Mapping[str, str | None], known: Sequence[str], asked: Sequence[str]) -> None:
    """Refuse an option that neither the command nor its methods have, and say where it belongs.

    Raises:
      UsageError: there is one.
    """
    accepted = {*known, *(f"no_{name}" for name in known), *RESERVED}
    for name in words:
        if name in accepted:
            continue
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


def _check_resumed(command: str, words: Mapping[str, str | None]) -> None:
    """Refuse, with --resume, what the run has of its own.

    Raises:
      ValueError: it was given.
    """
    if "resume" not in words:
        return
    for name, value in words.items():
        foreign = name == "algorithm" and is_foreign(value or "")
        movable = MOVABLE if command == "run" else {"resume"}
        if name not in movable and name not in RESERVED and not foreign:
            raise ValueError(f"{name} cannot be given with --resume: the run has its own")


def _not_for(words: Mapping[str, str | None]) -> set[str]:
    """The defaults of language models that do not suit: generation has no labels and its own number of rows."""
    unsuited = {"test_rows", "partition", "alpha"} if words.get("task") in GENERATES else set()
    return unsuited | ({"partition"} if "virtual" in words else set())


def _told_for_text(option: Option, value: Any) -> Option:
    """An option whose --help says what it is by default where the task is one of text."""
    return replace(option, text=f"{option.text.removesuffix('.')}. For tasks of text by default {value}.")


def parse(kind: Any, command: str, words: Sequence[str]) -> Any:
    """The options of a command.

    Args:
      kind: its dataclass.
      command: its name.
      words: what follows it.

    Raises:
      UsageError: the words are not its options, or an option is out of range or would have no effect.
    """
    given = option_words(words)
    if not issubclass(kind, Experiment):
        _check_known(command, given, list(own_options(kind)), [])
        try:
            check_choices(own_options(kind), given)
        except ValueError as error:
            raise UsageError(str(error)) from error
        return _parsed(kind, command, words)
    try:
        _check_resumed(command, given)
        words = _through_channels(kind, words)
        asked = _asked_for(kind, option_words(words))
        methods = list(methods_of(asked).values())
        whole = options_with(kind, methods)
        flat = own_options(whole) | shared_options(methods) | own_options(kind)
        _check_known(command, given, list(flat), asked)
        check_choices(flat, given)
        if given.get("task") in get_args(TEXT_TASK_NAMES):
            own = {name: value for name, value in TEXT_DEFAULTS.items() if name not in _not_for(given)}
            flat |= {name: replace(flat[name], default=value) for name, value in own.items() if name in flat}
        elif "task" not in given:
            flat |= {name: _told_for_text(flat[name], value) for name, value in TEXT_DEFAULTS.items() if name in flat}
        if any(method.is_private for method in methods) and "direction_groups" in flat:
            # Several groups are asked for, or there is one: see ``Method.build``.
            flat["direction_groups"] = replace(flat["direction_groups"], default="shared")
        nested = _parsed(_grouped(kind, flat, methods), command, words)
        values = {name: value for group in vars(nested).values() for name, value in vars(group).items()}
        options = whole(**values)
        check_heeded(options, methods, {name.removeprefix("no_") for name in given})
    except ValueError as error:
        # One of several is spoken of as the option that named it.
        several = str(error).startswith("algorithm ") and "algorithms" in own_options(kind)
        raise UsageError(str(error).replace("algorithm", "algorithms", 1) if several else str(error)) from error
    return options
