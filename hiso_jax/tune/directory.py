"""The settings of a study that Python asks for, its directory, and the locks by which processes share it."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hiso_jax.checks import ParameterError
from hiso_jax.experiment import DECIDING, as_choice, as_written, resolve
from hiso_jax.fed.ledger import exists, read_regular
from hiso_jax.renamed import IN_FILES
from hiso_jax.reports import create_directory
from hiso_jax.tune.settings import Study

CONFIG = "config.json"
# Options that are lists: of words, and of numbers.
WORDS, NUMBERS = ("algorithms", "learning_rate", "schedules"), ("mus", "local_learning_rates")


def asked(kind: type[Study], where: str, algorithms: Sequence[str], options: Mapping[str, Any]) -> Any:
    """The settings of a study from the keywords of a function.

    Args:
      kind: the dataclass of the settings.
      where: name of the function.
      algorithms: names of methods.
      options: the other keywords.

    Raises:
      ParameterError: an option is unknown, out of range or without effect.
    """
    if "resume" in options:
        raise ParameterError("resume", "must be given as `out`: a directory with the same settings goes on")
    given = {**options, "algorithms": algorithms}
    if "task" in given:
        given["task"] = as_choice(given["task"])
    for name in (*WORDS, *NUMBERS):
        several = given.get(name)
        if several is None and name == "algorithms":
            raise ParameterError(name, "must be names of methods, got None")
        if isinstance(several, str):
            several = several.split(",")
        values = [] if isinstance(several, str) or not isinstance(several, Iterable) else several
        other = next(
            (each for each in values if name in ("algorithms", "schedules") and not isinstance(each, str)), None
        )
        if other is not None:
            raise ParameterError(
                name,
                f'must be names, or "FILE:NAME" for your own code: files record them; got a {type(other).__name__}',
            )
        if several is not None and isinstance(several, Sequence) and not several:
            raise ParameterError(name, "must have at least one entry, got none")
        if several is not None:
            several = tuple(several) if isinstance(several, Iterable) else (several,)
            given[name] = tuple(map(str, several)) if name in WORDS else several
    names = {name: value for name, value in given.items() if name in DECIDING}
    return resolve(kind, names).settings(given, where)


@contextmanager
def directory_for(settings: Study, out: Path | str | None) -> Iterator[Callable[[], Path]]:
    """Yield a function that creates the directory of a study, to be called after all checks of the settings.

    Args:
      settings: the settings of the study.
      out: a new directory, or the directory of an earlier study with the same settings. None is a temporary directory.
    """
    if out is not None:
        if not isinstance(settings.task, str):
            raise ParameterError(
                "out",
                'cannot be given with a task that is a value, which files cannot name: give the task as "FILE:NAME"',
            )
        folder = Path(out)
        yield lambda: _going_on(folder, settings)
        return
    with tempfile.TemporaryDirectory() as name:
        yield lambda: Path(name)


def _going_on(folder: Path, settings: Study) -> Path:
    """A directory to write: a new one, or that of an earlier study with the same settings.

    Raises:
      ParameterError: the directory belongs to another study, or holds other files.
    """
    if not exists(folder / CONFIG, "out"):
        return create_directory(folder, "")
    try:
        written = json.loads(read_regular(folder / CONFIG))
    except ValueError:
        written = None
    wanted = json.loads(json.dumps(as_written(settings)))
    # Without a given number, the file holds the one that was found.
    beside = ["out", "resume"] + [name for name in ("target", "training_gb") if wanted[name] is None]
    if isinstance(written, dict):
        # Release 0.3 wrote no digests.
        beside += [name for name in wanted if name.endswith("_sha256") and name not in written]
    # Release 0.3 wrote its default of 1.
    if isinstance(written, dict) and wanted["local_steps"] is None and written.get("local_steps") == 1:
        written["local_steps"] = None
    options = {stored: name for name, stored in IN_FILES.items()}
    for name in wanted:
        if name not in beside and (not isinstance(written, dict) or written.get(name) != wanted[name]):
            named = options.get(name, name)
            raise ParameterError(
                "out", f"must be new, or of a study with the same settings; {folder} differs in {named}"
            )
    return folder


LOCKS = ".locks"


@contextmanager
def own_method(directory: Path, place: int) -> Iterator[bool]:
    """Yield whether this process holds the lock of the method at this place; the lock ends with the process."""
    held = _lock(directory, f"method-{place}")
    try:
        held.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        held.release()


def writing(directory: Path) -> FileLock:
    """The lock under which a process reads the trials of all processes and adds its own."""
    return _lock(directory, "tuning")


def _lock(directory: Path, name: str) -> FileLock:
    (directory / LOCKS).mkdir(exist_ok=True)
    return FileLock(directory / LOCKS / name)
