"""From a run's directory or a delta back to options, the model it began as, and what it became."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import jax
from jaxtyping import PyTree

from hiso_jax import fed, tasks
from hiso_jax.cli.devices import Devices
from hiso_jax.cli.experiment import build_optimizer, build_schedule, load_model
from hiso_jax.cli.options import Run
from hiso_jax.fed.ledger import EXECUTION, LEDGER, LedgerFile, base_fingerprints, release

CONFIG = "config.json"
# Where things are may change between a run and its continuation, and so may the machine; the rest is the run's.
MOVABLE = {"resume", "model", "data_dir", "snapshot_every", *EXECUTION, *(field.name for field in fields(Devices))}


def options_of(about: Mapping[str, Any]) -> Run:
    """The options of a run, from what was written of them.

    Raises:
      ValueError: they are not the options of this release.
    """
    if "algorithm" not in about:
        raise ValueError("a run that a program of its own made has no options: rebuild it there, by fed.replay")
    hints = get_type_hints(Run)
    given: dict[str, Any] = {}
    for name, value in about.items():
        if name not in hints:
            raise ValueError(f"{name} is no option of this release, {release()}; the run has another's")
        if "Path" in str(hints[name]) and value is not None:
            value = Path(value)
        given[name] = tuple(value) if isinstance(value, list) else value
    return Run(**given)


def recorded(run: Path, *, unfinished: bool) -> LedgerFile:
    """The ledger of a run that has ended, or as far as it has come if ``unfinished`` is set.

    Raises:
      ValueError: it cannot be read, was altered, or has not ended and that is not asked for.
    """
    ledger = fed.load(run, unfinished=True)
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
        if value == default or field.name == "resume":
            continue
        if field.name not in MOVABLE:
            raise ValueError(f"{field.name} cannot be given with --resume: the run has its own")
        changed[field.name] = value
    if (directory / LEDGER).exists():
        about = fed.load(directory, unfinished=True).header["about"]
    else:
        about = _config(directory)
    return replace(options_of(about), resume=directory, out=directory, **changed)


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
    tx = build_optimizer(options, options.algorithm, build_schedule(options, options.learning_rate))
    return fed.replay(base.params, tx, updates)
