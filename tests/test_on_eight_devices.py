"""Runs the tests of ``tests/mesh`` in processes that have eight virtual CPU devices.

The other tests run on one device: eight of them share the cores and make small programs twice as slow.
"""

import os
import subprocess
import sys

import pytest

from tests.marks import slow

FILES = ["test_sharded.py", "test_collectives.py", "test_explicit.py"]
SLOW_FILES = ["test_double_precision.py", "test_language_model.py"]


def run(repository, *arguments):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout, done.stdout


@pytest.mark.thorough
@pytest.mark.parametrize("file", [*FILES, *(slow(name) for name in SLOW_FILES)])
def test_on_eight_devices(repository, file):
    run(repository, f"tests/mesh/{file}")


@pytest.mark.slow
def test_on_every_mesh(repository):
    run(repository, "tests/mesh", "-m", "slow")
