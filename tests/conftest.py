"""Settings and fixtures that all tests share."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from hypothesis import settings

# The workers fill the cores, so splitting each program's code generation over threads only costs time. JAX reads this
# variable when a test first uses a device.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_parallel_codegen_split_count=1"

# Compilation makes the first example of a property slow, which is no fault of the property.
settings.register_profile("repo", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("repo")


def pytest_configure(config: pytest.Config) -> None:
    """Share compiled programs among tests and workers: many build the same simulation."""
    # Processes that a test starts find the cache's folder in their environment.
    cache = getattr(config, "workerinput", {}).get("compilation_cache") or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if cache is None:
        directory = tempfile.TemporaryDirectory(prefix="hiso-jax-tests-")
        config.add_cleanup(directory.cleanup)
        cache = directory.name
    config.stash[CACHE] = os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    # Cached files of datasets and transformers belong to the tests, too; no test may reach a hub.
    os.environ["HF_HOME"], os.environ["HF_HUB_OFFLINE"] = os.path.join(cache, "huggingface"), "1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# One pass of CI checks the annotations of shapes and dtypes while the tests run. An int is accepted for a float, as by
# type checkers (PEP 484).
if os.environ.get("HISO_JAX_CHECK_TYPES"):
    from jaxtyping import install_import_hook

    install_import_hook(
        ["hiso_jax.zo", "hiso_jax.fed"], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
    )

CACHE = pytest.StashKey[str]()


# These files take longest, because each starts one process or several. They begin first, so that no worker ends late.
LONGEST = ("test_on_eight_devices.py", "test_processes.py", "test_survival.py", "test_sweep.py", "test_legacy.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest tests first, so that no worker begins one of them at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """Pass the cache's folder to an xdist worker."""
    node.workerinput["compilation_cache"] = node.config.stash[CACHE]


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).parent.parent
