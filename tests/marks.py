"""Marks for cases that take seconds (thorough) or minutes (slow), which the plain test command leaves out."""

from typing import Any

import pytest


def thorough(*values: Any) -> Any:
    """A case that takes seconds."""
    return pytest.param(*values, marks=pytest.mark.thorough)


def slow(*values: Any) -> Any:
    """A case that takes minutes."""
    return pytest.param(*values, marks=pytest.mark.slow)
