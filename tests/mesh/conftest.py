"""Meshes of eight devices."""

import jax
import pytest

from hiso_jax import fed
from tests.marks import slow

SHAPES = {"1": (1, 1), "2": (2, 1), "4": (4, 1), "8": (8, 1), "2x4": (8, 4)}
FAST = ("8", "2x4")


@pytest.fixture(params=[name if name in FAST else slow(name) for name in SHAPES])
def mesh(request):
    """A mesh of clients, or of clients × model."""
    if jax.device_count() < 8:
        pytest.skip("needs eight devices; tests/test_on_eight_devices.py provides them")
    devices, model = SHAPES[request.param]
    return fed.make_mesh(devices, model_shards=model)
