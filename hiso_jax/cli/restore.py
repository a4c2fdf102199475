"""From a run's directory or a delta back to options, the model it began as, and what it became."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from hiso_jax import algorithms, fed, tasks
from hiso_jax.algorithms import Method
from hiso_jax.cli.experiment import build_algorithm, load_model
from hiso_jax.cli.methods import is_foreign, options_with, own_options
from hiso_jax.cli.options import MOVABLE, Experiment, Run
from hiso_jax.fed.ledger import LEDGER, LedgerFile, base_fingerprints
from hiso_jax.reports import as_json

CONFIG = "config.json"


def about_of(options: Run, method: Method) -> dict[str, Any]:
    """The options as a run's ledger holds them: whole paths, and the SHA-256 of the user's file, if there is one."""
    own = {} if method.sha256 is None else {"algorithm_sha256": method.sha256}
    return {**as_written(options), "resume": None, **own}


def as_written(options: Experiment) -> dict[str, Any]:
    """Options as JSON; what is on this machine by its whole path, for whoever continues."""
    given = {name: value for name, value in asdict(options).items() if name != "local_learning_rate"}
    for name in ("data_dir", "out", "resume", "trace"):
        if given.get(name) is not None:
            given[name] = Path(given[name]).resolve()
    if given["model"] is not None and Path(given["model"]).exists():
        given["model"] = Path(given["model"]).resolve()
    return as_json(given)


def method_of(about: Mapping[str, Any], algorithm: str | None) -> Method:
    """The method of a run, from what was written of it.

    Args:
      about: what was written.
      algorithm: the user's own, given again: a run does not say which code is run.

    Raises:
      ValueError: it has to be given, or is not the run's.
    """
    if "algorithm" not in about:
        raise ValueError("a run that a program of its own made has no options: rebuild it there, by fed.replay")
    recorded = about["algorithm"]
    if not is_foreign(recorded):
        if algorithm not in (None, recorded):
            raise ValueError(f"algorithm must be the run's, {recorded}, or not be given; got {algorithm}")
        return algorithms.load(recorded)
    if algorithm is None:
        raise ValueError(
            f"algorithm must be given again, as FILE:NAME: the run's is its user's own, {recorded}, and no code is run "
            "because a run names it"
        )
    method = algorithms.load(algorithm)
    (base, through), (wanted, own) = algorithms.split_name(algorithm), algorithms.split_name(recorded)
    if base.rpartition(":")[2] != wanted.rpartition(":")[2] or (method.sha256 is None and base != wanted):
        raise ValueError(f"algorithm must be the run's, {recorded}, wherever its file is now; got {algorithm}")
    if method.sha256 != about.get("algorithm_sha256"):
        raise ValueError(f"algorithm must be the file that the run was made with; the SHA-256 of {algorithm} differs")
    if through != own:
        raise ValueError(f"algorithm must go through the run's channels, as {recorded} does; got {algorithm}")
    return method


def options_of(about: Mapping[str, Any], algorithm: str | None = None) -> Run:
    """The options of a run, from what was written of them; those that there are no more have no effect.

    Args:
      about: what was written.
      algorithm: the user's own method, given again.

    Raises:
      ValueError: see :func:`method_of`.
    """
    method = method_of(about, algorithm)
    whole = options_with(Run, [method])
    known = own_options(whole)
    given: dict[str, Any] = {}
    for name, value in about.items():
        if name in known:
            if "Path" in str(known[name].kind) and value is not None:
                value = Path(value)
            given[name] = tuple(value) if isinstance(value, list) else value
    return whole(**{**given, "algorithm": method.name})


def recorded(run: Path, *, unfinished: bool) -> LedgerFile:
    """The ledger of a run that has ended, or as far as it has come if ``unfinished`` is set.

    Raises:
      ValueError: it cannot be read, was altered, has not ended and that is not asked for, or holds no scalars.
    """
    ledger = fed.load(run, unfinished=True)
    if ledger.records.aggregate is None:
        raise ValueError(
            f"{run} is a run of a method without scalars, whose messages are as large as the model and are not kept: "
            "it cannot be rebuilt, only gone on with from its snapshots, by hiso-jax run --resume"
        )
    if ledger.seal is None and not unfinished:
        raise ValueError(
            f"unfinished must be given to take the {len(ledger.rows):,} rounds that {run} has: it has no seal, so it "
            "has not finished, or its end was lost or altered"
        )
    return ledger


def resumed(options: Run) -> Run:
    """The options of the run that ``options.resume`` names, its directory the one to write.

    Raises:
      ValueError: it is no run's directory, its ledger is altered, or other options are given with it.
    """
    directory = options.resume
    assert directory is not None
    changed = {}
    for field in fields(options):
        value = getattr(options, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if value == default or field.name in ("resume", "algorithm"):
            continue
        if field.name not in MOVABLE:
            raise ValueError(f"{field.name} cannot be given with --resume: the run has its own")
        changed[field.name] = value
    if (directory / LEDGER).exists():
        about = fed.load(directory, unfinished=True).header["about"]
    else:
        about = _config(directory)
    algorithm = options.algorithm if options.algorithm != Run.algorithm else None
    return replace(options_of(about, algorithm), resume=directory, out=directory, **changed)


def _config(directory: Path) -> dict[str, Any]:
    """The options of a run that was ended before its ledger began.

    Raises:
      ValueError: there is no such run.
    """
    try:
        return json.loads((directory / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"resume must be the directory of a run; {directory} has no {LEDGER}") from error


@dataclass(frozen=True)
class Base:
    """What a run began as.

    Attributes:
      params: the trained parameters.
      frozen: the others, or None.
      pretrained, tuned: of a language model.
    """

    params: PyTree
    frozen: PyTree | None = None
    pretrained: Any = None
    tuned: Any = None


def base_of(options: Run, fingerprints: Mapping[str, Any], option: str) -> Base:
    """The model that a run with these options began as, without its data.

    Raises:
      ValueError: it cannot be loaded, or is not the one of these fingerprints.
    """
    if options.task in ("digits", "mnist"):
        network = tasks.NETWORKS[options.task](options.model)
        base = Base(network.init(fed.init_key(jax.random.key(options.seed))))
    else:
        pretrained, tuned = load_model(options)
        base = Base(tuned.trained, tuned.frozen, pretrained, tuned)
    if base_fingerprints(base.params, base.frozen) != dict(fingerprints):
        if base.tuned is None:
            raise ValueError(
                f"a run of {options.task} that began elsewhere cannot be rebuilt here: this backend and version of jax "
                "make other initial parameters"
            )
        raise ValueError(
            f"{option} must be the checkpoint that the run began with; the fingerprint of {options.model} differs"
        )
    return base


def rebuild(options: Run, base: Base, updates: fed.Updates) -> tuple[PyTree, Any]:
    """Parameters and optimizer state after ``updates``."""
    assert options.learning_rate is not None
    algorithm = build_algorithm(options, algorithms.load(options.algorithm), options.learning_rate)
    return fed.replay(base.params, algorithm, updates)
