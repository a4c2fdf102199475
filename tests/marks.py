"""Marks for cases that take seconds (thorough) or minutes (slow), which the plain test command leaves out."""

from typing import Any

import pytest


def thorough(*values: Any) -> Any:
    """A case that takes seconds. A whole test is marked with ``@pytest.mark.thorough``.

    Raises:
      TypeError: it decorates a test, which would vanish without a word.
    """
    if getattr(values[0], "__name__", "").startswith("test_"):
        raise TypeError("a whole test is marked with @pytest.mark.thorough")
    return pytest.param(*values, marks=pytest.mark.thorough)


def slow(*values: Any) -> Any:
    """A case that takes minutes."""
    return pytest.param(*values, marks=pytest.mark.slow)
