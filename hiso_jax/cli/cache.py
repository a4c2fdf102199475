"""Compiled programs are kept between runs, since compiling is most of a first one.

``HISO_JAX_CACHE`` names another folder for them, or is empty or ``off`` for none. ``JAX_COMPILATION_CACHE_DIR``, JAX's
own variable, is left to do what it says.
"""

import contextlib
import hashlib
import os
import platform
import re
import stat
from pathlib import Path

import jax
import platformdirs

VARIABLE = "HISO_JAX_CACHE"
# Of programs that were not used for the longest time, what is above this is dropped.
MOST_BYTES = 2 * 2**30
LEAST_SECONDS = 0.2


def processor() -> str:
    """What this processor can do, as a short word: machines of one cluster share a home and may differ.

    A kept program may use instructions that another processor lacks.
    """
    described = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):  # not Linux: the two words above must do
        described += re.findall(r"^(?:flags|Features|model name)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.M)[:2]
    return f"{platform.machine()}-{hashlib.sha256(' '.join(described).encode()).hexdigest()[:12]}"


def cache_folder() -> Path | None:
    """Where compiled programs are kept, apart for each processor and jaxlib; None for nowhere."""
    named = os.environ.get(VARIABLE)
    if named is not None and named.lower() in ("", "0", "off", "no"):
        return None
    root = Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("hiso-jax", appauthor=False))
    return root / f"jaxlib-{jax.lib.__version__}-{processor()}"


def keep_compiled() -> None:
    """Have JAX keep what it compiles, in a folder that only its owner can read or write, if there can be one."""
    folder = cache_folder()
    if folder is None or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        # What others can write is code that others can have us run.
        if hasattr(os, "getuid") and status.st_uid != os.getuid():
            return
        if stat.S_IMODE(status.st_mode) != 0o700:
            folder.chmod(0o700)
    except OSError:
        return  # a home that cannot be written: everything works, and is compiled again
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
