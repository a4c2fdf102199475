"""Cutting a task's training examples in two."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from hiso_jax.checks import ParameterError


def held_out(train: Mapping[str, Any], examples: int, seed: int) -> tuple[PyTree, PyTree]:
    """The training examples without ``examples`` random ones, and those.

    Args:
      train: arrays that share their leading axis.
      examples: how many to hold out.
      seed: of the choice.

    Raises:
      ValueError: ``examples`` does not leave both parts an example.
    """
    total = len(jax.tree.leaves(dict(train))[0])
    if not 0 < examples < total:
        raise ParameterError("examples", f"must be at least 1 and below {total}, got {examples}")
    order = np.random.default_rng(seed).permutation(total)
    held, kept = order[:examples], order[examples:]
    return jax.tree.map(lambda a: a[kept], dict(train)), jax.tree.map(lambda a: a[held], dict(train))
