"""The mathematics of scalar-only zeroth-order optimisation: pure functions of arrays."""

from hiso_jax.zo.accumulate import accumulate
from hiso_jax.zo.directions import (
    Directions,
    Sampler,
    direction,
    gaussian,
    perturb,
    perturbation_key,
    rademacher,
    sphere,
    working_dtype,
)
from hiso_jax.zo.scalars import Method, check_estimator, scalars, scan_perturbations
from hiso_jax.zo.step import step
from hiso_jax.zo.transforms import ScaleByZoState, decomfl, hiso, scale_by_hiso, scale_by_zo, zo_state

__all__ = [
    "Directions",
    "Method",
    "Sampler",
    "ScaleByZoState",
    "accumulate",
    "check_estimator",
    "decomfl",
    "direction",
    "gaussian",
    "hiso",
    "perturb",
    "perturbation_key",
    "rademacher",
    "scalars",
    "scale_by_hiso",
    "scale_by_zo",
    "scan_perturbations",
    "sphere",
    "step",
    "working_dtype",
    "zo_state",
]
