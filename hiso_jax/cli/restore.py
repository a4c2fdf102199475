"""Restore a run from its directory or a delta: its options, its base checkpoint, and its parameters."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from hiso_jax import algorithms, fed
from hiso_jax.algorithms import Method
from hiso_jax.checks import ParameterError, first_line
from hiso_jax.choices import Choice, Option, is_foreign
from hiso_jax.cli.options import Run
from hiso_jax.experiment import (
    KINDS,
    NESTED,
    choice_of,
    given_to,
    nested_choices,
    options_with,
    own_options,
    recorded_algorithm,
)
from hiso_jax.fed.ledger import LedgerFile, base_fingerprints
from hiso_jax.renamed import IN_FILES
from hiso_jax.tasks.named import Base


@dataclass(frozen=True, kw_only=True)
class Again:
    """Choices that are user code, which have to be named again: no code is run because a run names it.

    Attributes:
      algorithm: FILE:NAME of the run's method, needed if that is user code.
      task: FILE:NAME of the run's task, needed if that is user code.
      schedule: FILE:NAME of the run's schedule, needed if that is user code.
      sampler: FILE:NAME of the run's sampler, needed if that is user code.
      trainable: FILE:NAME of the run's choice of trainable parameters, needed if that is user code.
    """

    algorithm: str | None = None
    task: str | None = None
    schedule: str | None = None
    sampler: str | None = None
    trainable: str | None = None

    @property
    def again(self) -> dict[str, str]:
        """The names that were given, by kind."""
        given = {kind: getattr(self, kind, None) for kind in ("algorithm", *KINDS, *NESTED)}
        return {kind: name for kind, name in given.items() if name is not None}


def _check_again(kind: str, recorded: str, given: str | None, sha256: tuple[str | None, str | None]) -> None:
    """Refuse a choice that differs from the recorded one.

    Args:
      kind: the kind of choice.
      recorded: its name in the run.
      given: its name now, None if it is not given.
      sha256: SHA-256 of the file now, and in the run.

    Raises:
      ParameterError: the choice is another one, or the recorded one is user code and has to be given.
    """
    if not is_foreign(recorded):
        if given not in (None, recorded):
            raise ParameterError(kind, f"must be the run's, {recorded}, or not be given; got {given}")
        return
    if given is None:
        raise ParameterError(
            kind,
            f"must be given again, as FILE:NAME: the run's is its user's own, {recorded}, and no code is run "
            "because a run names it",
        )
    if given.rpartition(":")[2] != recorded.rpartition(":")[2] or (sha256[0] is None and given != recorded):
        raise ParameterError(kind, f"must be the run's, {recorded}, wherever its file is now; got {given}")
    if sha256[0] != sha256[1]:
        raise ParameterError(kind, f"must be the file that the run was made with; the SHA-256 of {given} differs")


def recorded_choice(kind: str, about: Mapping[str, Any], given: str | None) -> Choice:
    """A run's choice of a kind, from the recorded options ``about``.

    Raises:
      ParameterError: the given choice is not the run's, or the run's is user code and has to be given.
    """
    recorded = about.get(kind)
    if recorded is None:
        # Releases that recorded no partition used the task's default.
        recorded = "iid" if about.get("task") in ("squad", "drop", "xsum") else "dirichlet"
        recorded = recorded if kind == "partition" else getattr(Run, kind)
    if not isinstance(recorded, str):
        raise ParameterError(kind, "is not what the run can have had: it must be a name")
    if not is_foreign(recorded) or given is None:
        _check_again(kind, recorded, given, (None, None))
        return KINDS[kind].load(recorded)
    found = KINDS[kind].load(given)
    _check_again(kind, recorded, given, (found.sha256, about.get(f"{kind}_sha256")))
    return found


def method_of(about: Mapping[str, Any], algorithm: str | None) -> Method:
    """The method of a run, from its recorded options.

    Args:
      about: the recorded options.
      algorithm: name of user code, given again: no code is run because a run names it.

    Raises:
      ValueError: the method has to be given, or is not the run's.
    """
    if not isinstance(about.get("algorithm"), str):
        raise ValueError(
            "a run that a program of its own made has no options: there it goes on, with fed.Storage(folder, "
            "resume=True), or is rebuilt, by fed.replay"
        )
    recorded = about["algorithm"]
    if not is_foreign(recorded) or algorithm is None:
        _check_again("algorithm", recorded, algorithm, (None, None))
        return algorithms.load(recorded)
    method = algorithms.load(algorithm)
    (base, through), (wanted, own) = algorithms.split_name(algorithm), algorithms.split_name(recorded)
    _check_again("algorithm", wanted, base, (method.sha256, about.get("algorithm_sha256")))
    if through != own:
        raise ParameterError("algorithm", f"must go through the run's channels, as {recorded} does; got {algorithm}")
    return method


def options_of(
    about: Mapping[str, Any], again: Mapping[str, str] | None = None, kinds: Collection[str] = ("task", "schedule")
) -> Any:
    """The options of a run, from the recorded ones; recorded options that no longer exist have no effect.

    Args:
      about: the recorded options.
      again: names of user code, given again, by kind.
      kinds: kinds of choices that are needed beside the algorithm; the options of other kinds are left out.

    Raises:
      ValueError: see :func:`method_of`.
    """
    again = again or {}
    method = method_of(about, again.get("algorithm"))
    choices = [recorded_choice(kind, about, again.get(kind)) for kind in KINDS if kind in kinds]
    chosen = {choice.kind.name: choice.name for choice in choices}
    nested = recorded_nested([method], choices, about, again)
    choices += nested
    whole = options_with(Run, [method], choices)
    known = own_options(whole)
    given = recorded_values(known, about)
    unneeded = {kind: getattr(Run, kind) for kind in KINDS if kind not in kinds}
    # User code goes by the name that was given now.
    chosen |= {choice.kind.name: choice.name for choice in nested if is_foreign(choice.name)}
    return whole(**{**given, **unneeded, **chosen, "algorithm": method.name})


def recorded_nested(
    methods: Sequence[Method], choices: Sequence[Choice], about: Mapping[str, Any], again: Mapping[str, str]
) -> list[Choice]:
    """The choices that a run's method and task made by options of their own.

    Raises:
      ParameterError: see :func:`recorded_choice`.
    """
    names = {kind: about[kind] for kind in NESTED if isinstance(about.get(kind), str)}
    for kind, name in names.items():
        if is_foreign(name):
            found = None if kind not in again else NESTED[kind].load(again[kind])
            sha256 = None if found is None else found.sha256
            _check_again(kind, name, again.get(kind), (sha256, about.get(f"{kind}_sha256")))
            names[kind] = found
    return nested_choices(methods, choices, names)


def recorded_values(known: Mapping[str, Option], about: Mapping[str, Any]) -> dict[str, Any]:
    """The values of options, from the recorded ones.

    Raises:
      ValueError: a recorded value is not valid for its option.
    """
    # An option that was left open takes its present default.
    written = {name: about.get(IN_FILES.get(name, name)) for name in known}
    given = {name: as_option(known[name], value) for name, value in written.items() if value is not None}
    # The run is of a release that had neither hostile clients nor a guard against them.
    return given if "attackers" in about or "guard" not in known else given | {"guard": False}


def as_option(option: Option, value: Any) -> Any:
    """The value of an option, from its JSON value.

    Raises:
      ValueError: the value is not valid for the option.
    """
    from pydantic import TypeAdapter, ValidationError

    if value is None and option.default is None:
        return None
    try:
        # Validated as JSON, in which arrays may stand for tuples and strings for paths.
        return TypeAdapter(option.kind).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError, ValueError) as error:
        reason = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ParameterError(option.name, f"is not what the run can have had: {reason}") from None


def recorded(run: Path, *, unfinished: bool) -> LedgerFile:
    """The ledger of a finished run; with ``unfinished``, also of a run that has not finished.

    Raises:
      ValueError: the ledger cannot be read, was altered, is unfinished without ``unfinished``, or holds no scalars.
    """
    ledger = fed.load(run, unfinished=True)
    if ledger.records.aggregate is None:
        raise ValueError(
            f"{run} is a run of a method without scalars, whose messages are as large as the model and are not kept: "
            "it cannot be rebuilt, only gone on with from its snapshots, by hiso-jax run --resume"
        )
    if ledger.seal is None and not unfinished:
        raise ParameterError(
            "unfinished",
            f"must be given to take the {len(ledger.rows):,} rounds that {run} has: it has no seal, so it "
            "has not finished, or its end was lost or altered",
        )
    return ledger


def base_of(options: Any, fingerprints: Mapping[str, Any], option: str) -> Base:
    """The base checkpoint of a run with these options; made without the data for a task of this package.

    Raises:
      ValueError: the checkpoint cannot be loaded, or its fingerprints differ.
    """
    task, key = choice_of("task", options), fed.init_key(jax.random.key(options.seed))
    make = getattr(task.factory, "base", None)
    if make is not None:
        base = make(options.seed, key, **given_to(task, options))
    else:
        own = task.build(given_to(task, options), options.seed)
        base = Base(own.init(key), getattr(own, "frozen", None))
    if base_fingerprints(base.params, base.frozen) != dict(fingerprints):
        if base.tuned is None:
            raise ValueError(
                f"a run of {options.task} that began elsewhere cannot be rebuilt here: this backend and version of jax "
                "make other initial parameters"
            )
        raise ParameterError(
            option, f"must be the checkpoint that the run began with; the fingerprint of {options.model} differs"
        )
    return base


def rebuild(options: Run, base: Base, updates: fed.Updates) -> tuple[PyTree, Any]:
    """The parameters and the optimizer state after ``updates``."""
    if not isinstance(options.learning_rate, float):
        raise ParameterError("learning_rate", "must be a number to rebuild a run, and the run has none")
    algorithm = recorded_algorithm(options, algorithms.load(options.algorithm), options.learning_rate)
    try:
        return jax.block_until_ready(fed.replay(base.params, algorithm, updates))
    except Exception as error:
        # JAX raises various errors for records that do not fit this method and model.
        raise ValueError(f"the run's scalars do not suit its method and model: {first_line(error)}") from error
