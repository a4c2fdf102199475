"""The mathematics of scalar-only zeroth-order optimisation: pure functions of arrays."""

from typing import Any

from hiso_jax.exact import PIN, pin, rounded
from hiso_jax.renamed import successor
from hiso_jax.zo.accumulate import Ascent, Visits, accumulate, by_direction, fold_directions
from hiso_jax.zo.anchor import AnchorState, anchored_decay
from hiso_jax.zo.chain import check_chain, reads_loss, settled, update_with
from hiso_jax.zo.curvature import CurvatureForm, CurvatureUpdate, hiso, mean_square, scale_by_hiso
from hiso_jax.zo.differences import (
    DIFFERENCES,
    Difference,
    DifferenceName,
    as_difference,
    central,
    check_estimator,
    directional_derivatives,
    forward,
    probe,
    scalars,
    second,
    suggested_mu,
)
from hiso_jax.zo.directions import (
    Directions,
    as_directions,
    check_generator,
    direction,
    made_dense,
    perturb,
    perturbation_key,
    shares_matmuls,
    subspaces,
    working_dtype,
)
from hiso_jax.zo.groups import Direction, GroupedDirections
from hiso_jax.zo.hadamard import HadamardDirections, check_regenerated, grouped_directions
from hiso_jax.zo.heads import LocalStep, decomfl, grouped, head, scale_by_zo
from hiso_jax.zo.pool import Pool, in_order
from hiso_jax.zo.precision import in_float32, is_half, unmoved_share
from hiso_jax.zo.rounding import apply_updates, like_before
from hiso_jax.zo.samplers import (
    SAMPLERS,
    Blocks,
    Hadamard,
    LowRank,
    Sampler,
    SamplerName,
    Subspace,
    as_sampler,
    binomial,
    gaussian,
    rademacher,
    sphere,
    uniform,
)
from hiso_jax.zo.signs import block_size
from hiso_jax.zo.state import ScaleByZoState, zo_state, zo_states
from hiso_jax.zo.step import DirectionsMode, check_directions, step
from hiso_jax.zo.threefry import drawn, fold_in

__all__ = [
    "DIFFERENCES",
    "PIN",
    "SAMPLERS",
    "AnchorState",
    "Ascent",
    "Blocks",
    "CurvatureForm",
    "CurvatureUpdate",
    "Difference",
    "DifferenceName",
    "Direction",
    "Directions",
    "DirectionsMode",
    "GroupedDirections",
    "Hadamard",
    "HadamardDirections",
    "LocalStep",
    "LowRank",
    "Pool",
    "Sampler",
    "SamplerName",
    "ScaleByZoState",
    "Subspace",
    "Visits",
    "accumulate",
    "anchored_decay",
    "apply_updates",
    "as_difference",
    "as_directions",
    "as_sampler",
    "binomial",
    "block_size",
    "by_direction",
    "central",
    "check_chain",
    "check_directions",
    "check_estimator",
    "check_generator",
    "check_regenerated",
    "decomfl",
    "direction",
    "directional_derivatives",
    "drawn",
    "fold_directions",
    "fold_in",
    "forward",
    "gaussian",
    "grouped",
    "grouped_directions",
    "head",
    "hiso",
    "in_float32",
    "in_order",
    "is_half",
    "like_before",
    "made_dense",
    "mean_square",
    "perturb",
    "perturbation_key",
    "pin",
    "probe",
    "rademacher",
    "reads_loss",
    "rounded",
    "scalars",
    "scale_by_hiso",
    "scale_by_zo",
    "second",
    "settled",
    "shares_matmuls",
    "sphere",
    "step",
    "subspaces",
    "suggested_mu",
    "uniform",
    "unmoved_share",
    "update_with",
    "working_dtype",
    "zo_state",
    "zo_states",
]


def __getattr__(name: str) -> Any:
    """Raise for an unknown name; the error of a name of an earlier release gives its successor."""
    raise successor(__name__, name)
