"""The options of a run or a study, as its directory records them, in the words of the command line."""

import contextlib
import shlex
from collections.abc import Mapping
from typing import Any

from hiso_jax import algorithms
from hiso_jax.choices import is_foreign
from hiso_jax.experiment.composed import KINDS, NESTED, nested_choices, options_with, own_options
from hiso_jax.renamed import IN_FILES
from hiso_jax.reports import as_json

# Shown apart, or without a meaning elsewhere.
APART = ("task", "algorithm", "algorithms", "algorithm_sha256", "algorithms_sha256", "model", "out", "resume")


def defaults_of(about: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The default options of a command with recorded choices; without those of a user's code, which is not run.

    Args:
      about: the recorded options.
      kind: the dataclass of the command.
    """
    methods, choices = [], []
    named = about.get("algorithms") or [about.get("algorithm")]
    for name in named:
        if isinstance(name, str) and not is_foreign(name):
            with contextlib.suppress(ValueError):
                methods.append(algorithms.load(name))
    for each in KINDS:
        name = about.get(each)
        if isinstance(name, str) and not is_foreign(name):
            with contextlib.suppress(ValueError):
                choices.append(KINDS[each].load(name))
    with contextlib.suppress(ValueError):
        inner = {each: name for each in NESTED if isinstance(name := about.get(each), str) and not is_foreign(name)}
        choices += nested_choices(methods, choices, inner)
    known = own_options(options_with(kind, methods, choices))
    return {IN_FILES.get(name, name): option.default for name, option in known.items()}


def changed_options(about: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The recorded options that differ from the defaults, without those that are shown apart.

    Args:
      about: the recorded options.
      kind: the dataclass of the command.
    """
    defaults = as_json(defaults_of(about, kind))
    # Releases before 0.3 also wrote the options of factories that were not chosen.
    unread = set().union(*(each.every_option() for each in (*KINDS.values(), *NESTED.values())))
    hidden = {*APART, *(unread - {*defaults})}
    return {
        name: value
        for name, value in about.items()
        if name not in hidden and value is not None and value != defaults.get(name)
    }


def as_words(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line, each with its value."""
    words = []
    for name, value in options.items():
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        typed = {stored: own for own, stored in IN_FILES.items()}.get(name, name).replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{typed}" if value else f"--no-{typed}")
        else:
            words.append(f"--{typed} {shlex.quote(text)}")
    return words


def command_of(about: Mapping[str, Any], command: str, kind: type) -> str:
    """The command that makes a run or a study again; empty if its task is a value of a program.

    Args:
      about: the recorded options.
      command: the name of the command.
      kind: the dataclass of the command.
    """
    if "rounds" not in about:
        return ""
    defaults = as_json(defaults_of(about, kind))
    # A run of a comparison also records the comparison's options.
    named = [name for name in ("task", "algorithm", "algorithms", "model") if name in defaults]
    first = {name: about[name] for name in named if about.get(name) not in (None, defaults[name])}
    known = {name: value for name, value in changed_options(about, kind).items() if name in defaults}
    return " ".join(["hiso-jax", command, *as_words({**first, **known})])
