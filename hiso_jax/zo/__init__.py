"""The mathematics of scalar-only zeroth-order optimisation: pure functions of arrays."""

from hiso_jax.zo.accumulate import Ascent, accumulate, add_direction, zero_direction
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
from hiso_jax.zo.heads import ScaleByZoState, check_chain, decomfl, hiso, scale_by_hiso, scale_by_zo, zo_state
from hiso_jax.zo.rounding import apply_updates, store
from hiso_jax.zo.scalars import Method, check_estimator, scalars, scan_perturbations
from hiso_jax.zo.step import DirectionsMode, check_directions, step
from hiso_jax.zo.walls import pin

__all__ = [
    "Ascent",
    "Directions",
    "DirectionsMode",
    "Method",
    "Sampler",
    "ScaleByZoState",
    "accumulate",
    "add_direction",
    "apply_updates",
    "check_chain",
    "check_directions",
    "check_estimator",
    "decomfl",
    "direction",
    "gaussian",
    "hiso",
    "perturb",
    "perturbation_key",
    "pin",
    "rademacher",
    "scalars",
    "scale_by_hiso",
    "scale_by_zo",
    "scan_perturbations",
    "sphere",
    "step",
    "store",
    "working_dtype",
    "zero_direction",
    "zo_state",
]
