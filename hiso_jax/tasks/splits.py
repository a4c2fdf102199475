"""A random split of a task's training examples into two parts."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from hiso_jax.checks import ParameterError


def held_out(train: Mapping[str, Any], examples: int, seed: int) -> tuple[PyTree, PyTree]:
    """The kept and the held-out training examples; ``examples`` of them are held out at random.

    Args:
      train: arrays that share their leading axis.
      examples: the number of examples to hold out.
      seed: the seed of the random choice.

    Raises:
      ValueError: a part would have no examples.
    """
    total = len(jax.tree.leaves(dict(train))[0])
    if not 0 < examples < total:
        raise ParameterError("examples", f"must be at least 1 and below {total}, got {examples}")
    order = np.random.default_rng(seed).permutation(total)
    held, kept = order[:examples], order[examples:]
    return jax.tree.map(lambda a: a[kept], dict(train)), jax.tree.map(lambda a: a[held], dict(train))
