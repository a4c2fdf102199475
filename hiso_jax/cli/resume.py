"""The options of a run or a study that ``--resume`` continues, from its directory."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hiso_jax import algorithms, fed
from hiso_jax.checks import ParameterError
from hiso_jax.choices import is_foreign
from hiso_jax.cli.options import MOVABLE, MOVED, Run
from hiso_jax.cli.restore import options_of, recorded_choice, recorded_nested, recorded_values
from hiso_jax.experiment import KINDS, NESTED, choice_of, is_language_model, methods_of, options_with, own_options
from hiso_jax.fed.ledger import LEDGER, exists, links_in, read_regular
from hiso_jax.tune import CONFIG, Compare, Sweep


def continuing(command: str, options: Any, directory: Path) -> str:
    """The command that continues a run or a study; it names the user's own code again."""
    words = ["hiso-jax", command, "--resume", str(directory)]
    for kind in ("algorithm", *KINDS, *NESTED):
        name = getattr(options, kind, None) or ""
        words += [f"--{kind}", name] if is_foreign(name) else []
    for several in ("algorithms", "schedules"):
        own = [name.partition("+")[0] for name in getattr(options, several, ()) if is_foreign(name)]
        words += [f"--{several}", ",".join(own)] if own else []
    return " ".join(words)


def resumed(options: Any) -> Run:
    """The options of the run in the directory ``options.resume``, with that directory as the one to write.

    Args:
      options: the options that were given, whose names are ``options.given``.

    Raises:
      ValueError: it is not the directory of a run, its ledger was altered, or an option is given that cannot change.
    """
    directory = options.resume
    assert directory is not None
    _check_folder(directory, "run")
    named = ("algorithm", *KINDS, *NESTED)
    changed = {name: getattr(options, name) for name in options.given if name not in ("resume", *named)}
    for name in changed:
        if name not in MOVABLE and name not in MOVED:
            raise ParameterError(name, "cannot be given with --resume: the run has its own")
    if exists(directory / LEDGER, "resume"):
        ledger = fed.load(directory, unfinished=True)
        about, found = ledger.about, len(ledger.rows)
    else:
        about, found = _config(directory, "run"), 0
        if "algorithms" in about:
            kind = "compare" if "protocol" in about else "sweep"
            raise ParameterError(
                "resume", f"must be the directory of a run; what {directory} holds goes on with {kind}"
            )
    again = {kind: name for kind in named if is_foreign(name := getattr(options, kind, None) or "")}
    recorded = options_of(about, again, tuple(KINDS))
    for name in MOVED:
        if name in changed and not hasattr(recorded, name):
            raise ParameterError(name, f"is no option of the run's task, {recorded.task}")
    if changed.get("model") is not None and not is_language_model(choice_of("task", recorded)):
        raise ParameterError("model", f"must not be given for {recorded.task}, whose network is in the package")
    rounds = changed.get("rounds", recorded.rounds)
    if rounds != recorded.rounds and "rounds" in choice_of("schedule", recorded).inputs:
        raise ParameterError(
            "rounds",
            f"must be the run's, {recorded.rounds}: its schedule, {recorded.schedule}, ends there; got {rounds}",
        )
    if rounds != recorded.rounds and recorded.epsilon is not None:
        raise ParameterError(
            "rounds", f"must be the run's, {recorded.rounds}: its noise was found for them; got {rounds}"
        )
    if rounds < found:
        raise ParameterError("rounds", f"must be at least the {found} that the run has, got {rounds}")
    return replace(recorded, resume=directory, out=directory, **changed)


def resumed_study(options: Any) -> Any:
    """The options of the sweep or comparison in the directory ``options.resume``.

    Args:
      options: the options that were given, whose names are ``options.given``.

    Raises:
      ValueError: it is not the directory of a study, or it holds links.
    """
    directory, study = options.resume, "sweep or a comparison"
    assert directory is not None
    _check_folder(directory, study)
    about = _config(directory, study)
    named = about.get("algorithms")
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ParameterError("resume", f"must be the directory of a {study}; {directory} is not one")
    several = [name for name in about.get("schedules") or [] if isinstance(name, str)]
    for option, names in (("algorithms", named), ("schedules", several)):
        _check_several(option, names, getattr(options, option, ()) if option in options.given else (), about)
    # The command's own dataclass, without the options added to it.
    kind = next(base for base in type(options).__mro__ if base in (Sweep, Compare))
    again = {name: given for name in (*KINDS, *NESTED) if is_foreign(given := getattr(options, name, None) or "")}
    choices = [recorded_choice(name, about, again.get(name)) for name in KINDS]
    choices += [KINDS["schedule"].load(name) for name in several if name != choices[-1].name]
    methods = list(methods_of(named).values())
    choices += recorded_nested(methods, choices, about, again)
    whole = options_with(kind, methods, choices)
    known = own_options(whole)
    given = recorded_values(known, about) | {choice.kind.name: choice.name for choice in choices[: len(KINDS)]}
    given = {name: value for name, value in given.items() if name not in kind.HIDDEN}
    return whole(**{**given, "resume": directory, "out": directory})


def _check_several(option: str, names: Sequence[str], given: Sequence[str], about: Mapping[str, Any]) -> None:
    """Refuse to resume a study unless the user's own choices in a list are given again, as the same files.

    Args:
      option: "algorithms" or "schedules".
      names: the names that the study recorded.
      given: the names that were given again.
      about: the study's options.

    Raises:
      ParameterError: a user's own choice is not given, another one is, or its file differs.
    """
    load: Callable[[str], Any] = algorithms.load if option == "algorithms" else KINDS["schedule"].load
    # A method's name may end with its channels.
    own = {name.partition("+")[0]: name for name in names if is_foreign(name)}
    for name in own:
        if name not in given:
            raise ParameterError(
                option, f"must name {name} again, which is its user's own: no code is run because a directory names it"
            )
    digests = about.get(f"{option}_sha256")
    for name in given:
        if name not in own:
            raise ParameterError(option, f"cannot be given with --resume, except for the study's own code; got {name}")
        if not isinstance(digests, dict) or load(name).sha256 != digests.get(own[name]):
            raise ParameterError(option, f"must be the files that the study began with; the SHA-256 of {name} differs")


def _check_folder(directory: Path, kind: str) -> None:
    """Refuse a folder that is not a run's, or holds links: a run's writes and removals would take place elsewhere.

    Raises:
      ValueError: the folder has neither a ledger nor a file of options, or holds a symbolic link.
    """
    if not any(exists(directory / name, "resume") for name in (LEDGER, CONFIG)):
        missing = LEDGER if kind == "run" else CONFIG
        raise ParameterError("resume", f"must be the directory of a {kind}; {directory} has no {missing}")
    links = links_in(directory)
    if links:
        raise ParameterError(
            "resume", f"must be a directory that holds its own files; {links[0]} is a link to {os.readlink(links[0])}"
        )


def _config(directory: Path, kind: str) -> dict[str, Any]:
    """The options that a command wrote when it began.

    Raises:
      ValueError: the file of options is missing or invalid.
    """
    try:
        content = json.loads(read_regular(directory / CONFIG))
        if isinstance(content, dict):
            return content
    except (ValueError, RecursionError):
        pass
    raise ParameterError(
        "resume", f"must be the directory of a {kind} whose {CONFIG} is as it was written; {directory}'s is not"
    )
