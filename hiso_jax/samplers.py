"""Samplers by name: the family of raw perturbations, as in ``--sampler`` of the methods that have this option.

A sampler is a factory ``name(*, options)`` that returns a :data:`hiso_jax.zo.Sampler`: a function (key, shape, dtype) →
array with E[u uᵀ] = I.
"""

from collections.abc import Callable
from typing import Any

from hiso_jax import zo
from hiso_jax.choices import Kind


def low_rank(*, rank: int = 1) -> zo.LowRank:
    """Matrices A Bᵀ/√r (EGGROLL, arXiv 2511.16652).

    Args:
      rank: rank r of the directions of a matrix.
    """
    return zo.LowRank(rank)


def _of_no_options(sampler: Any) -> Callable[[], Any]:
    return lambda: sampler


SAMPLERS = Kind(
    "sampler",
    {name: low_rank if name == "low_rank" else _of_no_options(sampler) for name, sampler in zo.SAMPLERS.items()},
    returns="Sampler",
    is_valid=callable,
)
