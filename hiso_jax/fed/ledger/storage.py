"""The directory of a run, the lock of its one writer, and the environment that an exact replay must share."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock, Timeout

from hiso_jax.checks import ParameterError, integer, of_kind
from hiso_jax.paths import as_path
from hiso_jax.version import VERSION

LOCK = ".lock"
PACKAGES = ("jax", "jaxlib", "optax", "numpy")
FLAGS = ("jax_enable_x64", "jax_threefry_partitionable", "jax_default_matmul_precision")


@dataclass(frozen=True)
class Storage:
    """The directory of a run, in which it survives its process.

    Attributes:
      directory: the run's own directory, a path or a string; created if it does not exist.
      about: description of the run for its readers, as JSON values, such as the command's options.
      snapshot_every: rounds between snapshots, which bound how many a resumed run replays; 0 takes none; None takes
        one every ten minutes of rounds.
      resume: continue the run in the directory, or begin it if it had not begun; it may be given more rounds than it
        had.
      from_snapshot: begin a resumed run with the newest snapshot if this processor or jaxlib computes other initial
        parameters than the run's; the rounds before the snapshot are then not checked.
    """

    directory: Path | str
    about: Mapping[str, Any] = field(default_factory=dict)
    snapshot_every: int | None = None
    resume: bool = False
    from_snapshot: bool = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
          ValueError: ``snapshot_every`` is negative, or ``from_snapshot`` is set without ``resume``.
        """
        object.__setattr__(self, "directory", as_path("directory", self.directory))
        of_kind("resume", self.resume, bool, "True or False")
        of_kind("about", self.about, Mapping, "a dict of JSON values")
        if self.snapshot_every is not None:
            integer("snapshot_every", self.snapshot_every, 0)
        if self.from_snapshot and not self.resume:
            raise ParameterError("from_snapshot", "must be given with resume: it says how a run is continued")

    @property
    def folder(self) -> Path:
        """:attr:`directory` as a path."""
        return Path(self.directory)


def environment() -> dict[str, Any]:
    """The environment that a replay must share with a run to rebuild it bit for bit, and versions for reference."""
    return {
        "versions": {
            "hiso-jax": VERSION,
            **{name: version(name) for name in PACKAGES},
            "python": platform.python_version(),
        },
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "flags": {name: getattr(jax.config, name) for name in FLAGS},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def differences(there: Mapping[str, Any], here: Mapping[str, Any] | None = None) -> list[str]:
    """The differences between ``there`` and ``here`` (by default this environment) that may change a replay's bits."""
    here = environment() if here is None else here
    differing = {
        "backend": (there["backend"], here["backend"]),
        "device": (there["device"], here["device"]),
        "jaxlib": (there["versions"]["jaxlib"], here["versions"]["jaxlib"]),
        "XLA_FLAGS": (there["xla_flags"], here["xla_flags"]),
        **{name: (there["flags"].get(name), value) for name, value in here["flags"].items()},
    }
    return [f"{name} {before!r} there, {now!r} here" for name, (before, now) in differing.items() if before != now]


def lock(directory: Path) -> FileLock:
    """The lock of the run's one writer, acquired; it ends with its process, however the process ends.

    Raises:
      ValueError: another process holds the lock, or the directory cannot be written.
    """
    held = FileLock(directory / LOCK, is_singleton=True)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{directory} is being written by another process, and a run has one writer") from None
    except OSError as error:
        raise ValueError(f"{directory} cannot be written ({error.strerror})") from error
    return held
