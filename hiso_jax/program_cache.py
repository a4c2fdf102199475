"""The caches of compiled programs, between processes and within one, since compiling takes most of a first run.

Commands, simulations, sweeps and replays use the cache between processes. ``HISO_JAX_CACHE`` names another folder for
it; empty or ``off`` disables it. JAX's own settings take precedence: a program or its environment that names a folder,
or turns JAX's cache off, is not overruled. Runs of one process whose programs are equal, of other seeds, populations
or learning rates, say, share them in memory.
"""

import contextlib
import hashlib
import os
import platform
import re
import stat
from collections import OrderedDict
from pathlib import Path
from typing import Any

import jax
import platformdirs
from jax.stages import Compiled, Lowered

VARIABLE = "HISO_JAX_CACHE"
# Above this size, the programs that were not used for the longest time are dropped.
MOST_BYTES = 2 * 2**30
LEAST_SECONDS = 0.2
# The programs that a process keeps: rounds and evaluations of a few methods.
KEPT = 16
_kept: OrderedDict[tuple[Any, ...], Compiled] = OrderedDict()
# JAX's limits of its cache: their defaults there, and here. Other values are the user's own.
LIMITS: dict[str, tuple[float, float]] = {
    "jax_persistent_cache_min_compile_time_secs": (1.0, LEAST_SECONDS),
    "jax_persistent_cache_min_entry_size_bytes": (0, -1),
    "jax_compilation_cache_max_size": (-1, MOST_BYTES),
}


def processor() -> str:
    """A short word that identifies this processor and its instruction set.

    Machines of one cluster share a home directory and may differ, and a cached program may use instructions that
    another processor lacks.
    """
    described = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):  # not Linux: only the two words above
        described += re.findall(r"^(?:flags|Features|model name)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.M)[:2]
    return f"{platform.machine()}-{hashlib.sha256(' '.join(described).encode()).hexdigest()[:12]}"


def cache_folder() -> Path | None:
    """The folder of compiled programs, separate for each processor and jaxlib; None if the cache is disabled."""
    named = os.environ.get(VARIABLE)
    if named is not None and named.lower() in ("", "0", "off", "no"):
        return None
    root = Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("hiso-jax", appauthor=False))
    return root / f"jaxlib-{jax.lib.__version__}-{processor()}"


def keep_compiled() -> None:
    """Make JAX keep compiled programs in a folder that only its owner can read or write, if it can be created.

    A second call has no effect, and neither has one after the user's own choice of a folder.
    """
    folder, settings = cache_folder(), jax.config.values
    if folder is None or settings["jax_compilation_cache_dir"] is not None:
        return
    if not settings["jax_enable_compilation_cache"]:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        # A program that others can write is code that they can make this process run.
        if hasattr(os, "getuid") and status.st_uid != os.getuid():
            return
        if stat.S_IMODE(status.st_mode) != 0o700:
            folder.chmod(0o700)
    except OSError:
        return  # the home directory cannot be written: everything works, and is compiled again
    jax.config.update("jax_compilation_cache_dir", str(folder))
    for name, (default, own) in LIMITS.items():
        if settings[name] == default:
            jax.config.update(name, own)


def compiled(lowered: Lowered, devices: Any) -> Compiled:
    """The compiled program: one that this process compiled before, if it has the same code and the same arguments.

    Args:
      lowered: the program; equal text is equal code, with all constants in it.
      devices: the devices, or the mesh, that it is for.
    """
    text = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    key = text, lowered.in_tree, lowered.out_tree, devices, jax.config.values["jax_default_device"]
    program = _kept.get(key) or lowered.compile()
    _kept[key] = program
    _kept.move_to_end(key)
    if len(_kept) > KEPT:
        _kept.popitem(last=False)
    return program
