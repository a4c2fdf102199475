"""HiSo (arXiv 2506.02370): directions shaped by a diagonal curvature learned from the same scalars.

z_p = H^{-1/2} u_p,   Δ = (1/P) Σ_p ĝ_p z_p,   x ← x − η Δ,   H ← γ H + (1 − γ)(Δ² + ε).
Bytes a round: 4·K·P up, 4·K·P down; memory: H, as large as the trained parameters.
"""

from typing import Literal

import optax

from hiso_jax import zo
from hiso_jax.algorithms._server import descent
from hiso_jax.checks import between
from hiso_jax.fed.algorithm import Algorithm, default_rates


@default_rates(digits=0.017, mnist=0.0017, full=5e-5, adapters=1e-2)
def hiso(
    learning_rate: optax.ScalarOrSchedule,
    *,
    curvature_decay: float = 0.95,
    curvature_update: zo.CurvatureUpdate = "last",
    curvature_dtype: Literal["float32", "bfloat16"] = "float32",
    curvature_form: zo.CurvatureForm | None = None,
    sampler: zo.SamplerName = "gaussian",
    weight_decay: float = 0.0,
    momentum: float = 0.0,
) -> Algorithm:
    """HiSo.

    Args:
      learning_rate: η.
      curvature_decay: weight γ that HiSo's curvature keeps in each round; 1 is DeComFL.
      curvature_update: local steps of a round that update the curvature, the last or all.
      curvature_dtype: dtype of the curvature; bfloat16 halves its memory and is rounded stochastically.
      curvature_form: diagonal, or factored with one entry for each row and column of a matrix; by default factored for
        directions of low rank, which keep their rank, else diagonal.
      sampler: family of raw perturbations.
      weight_decay: decoupled weight decay on the server, added to the ascent direction; 0 is none.
      momentum: heavy-ball momentum on the server, which costs no bytes; 0 is none.
    """
    between("curvature_decay", curvature_decay, 0, 1)
    head = zo.scale_by_hiso(
        decay=curvature_decay,
        curvature_update=curvature_update,
        curvature_dtype=None if curvature_dtype == "float32" else curvature_dtype,
        curvature_form=curvature_form,
        sampler=sampler,
    )
    return Algorithm(optax.chain(head, descent(learning_rate, weight_decay=weight_decay, momentum=momentum)))
