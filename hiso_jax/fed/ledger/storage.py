"""Where a run is kept, who may write there, and what its replay must have in common with it."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock, Timeout

from hiso_jax.checks import ParameterError, integer
from hiso_jax.version import VERSION

LOCK = ".lock"
PACKAGES = ("jax", "jaxlib", "optax", "numpy")
FLAGS = ("jax_enable_x64", "jax_threefry_partitionable", "jax_default_matmul_precision")


@dataclass(frozen=True)
class Storage:
    """Where a run is kept, so that it survives its process.

    Attributes:
      directory: the run's own, a path or its text; made if there is none.
      about: what a reader should know of the run beside its numbers, as JSON: the command's options, say.
      snapshot_every: rounds between snapshots, which bound how many a resumed run replays; 0 takes none; None takes
        one every ten minutes of rounds.
      resume: continue the run that is there; if it had not begun, begin it. It may be given more rounds than it had.
      from_snapshot: when it is continued where the processor or jaxlib compute other initial parameters, begin with the
        newest snapshot in place of them; what its rounds lead to is then not checked before it.
    """

    directory: Path | str
    about: Mapping[str, Any] = field(default_factory=dict)
    snapshot_every: int | None = None
    resume: bool = False
    from_snapshot: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked.

        Raises:
          ValueError: a negative ``snapshot_every``, or a snapshot to go on from where nothing is to be continued.
        """
        object.__setattr__(self, "directory", Path(self.directory))
        if self.snapshot_every is not None:
            integer("snapshot_every", self.snapshot_every, 0)
        if self.from_snapshot and not self.resume:
            raise ParameterError("from_snapshot", "must be given with resume: it says how a run is continued")

    @property
    def folder(self) -> Path:
        """:attr:`directory` as a path."""
        return Path(self.directory)


def environment() -> dict[str, Any]:
    """What a replay must have in common with a run to rebuild it to the last bit, and versions to trace it by."""
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
    """How another environment differs from ``here``, by default this one, in what may change a replay's last bits."""
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
    """Enter it to be the run's one writer; the lock goes with its process, however that ends.

    Raises:
      ValueError: another process is, or the directory cannot be written.
    """
    held = FileLock(directory / LOCK, is_singleton=True)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{directory} is being written by another process, and a run has one writer") from None
    except OSError as error:
        raise ValueError(f"{directory} cannot be written ({error.strerror})") from error
    return held
