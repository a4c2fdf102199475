"""Anchored weight decay behind every method that sends scalars."""

from dataclasses import replace

import optax

from hiso_jax import zo
from hiso_jax.checks import between
from hiso_jax.fed.algorithm import Algorithm


def anchored(algorithm: Algorithm, *, anchor_decay: float = 0.0) -> Algorithm:
    """The algorithm, whose server goes back towards the initial parameters; see :func:`hiso_jax.zo.anchored_decay`.

    Args:
      algorithm: the algorithm of a method that sends scalars.
      anchor_decay: share of the way back to the initial parameters that the server goes in every round, whatever the
        learning rate; it costs no bytes; 0 is none.

    Raises:
      ParameterError: ``anchor_decay`` is not between 0 and 1.
    """
    between("anchor_decay", anchor_decay, 0, 1)
    if not anchor_decay:
        return algorithm
    return replace(algorithm, tx=optax.chain(algorithm.tx, zo.anchored_decay(anchor_decay)))
