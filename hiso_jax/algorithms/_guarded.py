"""What every method that sends scalars can be asked for: a guard against messages out of all proportion."""

from dataclasses import replace

from hiso_jax import channels
from hiso_jax.fed.algorithm import Algorithm


def guarded(algorithm: Algorithm, *, guard: bool = True) -> Algorithm:
    """The algorithm, guarded; of a private one every message is clipped anyhow, and nothing may depend on the others.

    Args:
      algorithm: of a method that sends scalars.
      guard: shorten messages more than three times as long as the cohort's median, or as messages used to be; all
        others pass to the bit.
    """
    if not guard or algorithm.is_private:
        return algorithm
    return replace(algorithm, rescale=(channels.guard(), *algorithm.rescale))
