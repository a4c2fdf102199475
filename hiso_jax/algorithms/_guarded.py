"""The option ``guard`` of every method that sends scalars: a guard against oversized messages."""

from dataclasses import replace

from hiso_jax import channels
from hiso_jax.fed.algorithm import Algorithm


def guarded(algorithm: Algorithm, *, guard: bool = True) -> Algorithm:
    """The algorithm with a guard; a private algorithm stays unchanged.

    A private algorithm clips every message anyway, and its clipping must not depend on other messages.

    Args:
      algorithm: the algorithm of a method that sends scalars.
      guard: clipping of messages more than three times as long as the cohort's median, or as past messages; all
        others keep their bits.
    """
    if not guard or algorithm.is_private:
        return algorithm
    return replace(algorithm, rescale=(channels.guard(), *algorithm.rescale))
