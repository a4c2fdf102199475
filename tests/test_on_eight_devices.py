"""Runs the tests of ``tests/mesh`` in processes that have eight virtual CPU devices.

The other tests run on one device: eight of them share the cores and make small programs twice as slow.
"""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("file", ["test_sharded.py", "test_double_precision.py", "test_collectives.py"])
def test_on_eight_devices(repository, file):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/mesh/{file}"]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout, done.stdout
