"""What all tests share."""

from collections.abc import Iterator

import jax
import pytest
from hypothesis import settings

# Compilation makes the first example of a property slow; that says nothing about the property.
settings.register_profile("repo", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("repo")


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield
