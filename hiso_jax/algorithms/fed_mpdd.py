"""FedMPDD (arXiv 2512.20814): a client sends its gradient projected on several directions of its own.

s_{i,p} = ⟨∇f_i(x_r), v_{i,p}⟩, p < P, v_{i,p} of random signs,   x ← x − η (1 / W) Σ_i w_i (1/P) Σ_p s_{i,p} v_{i,p}.
Bytes a round: 4 P up.
"""

import optax

from hiso_jax import zo
from hiso_jax.algorithms._server import descent
from hiso_jax.fed.algorithm import Algorithm, default_rates, projections


@default_rates(perturbations=64, digits=0.6)
def fed_mpdd(learning_rate: optax.ScalarOrSchedule, *, sampler: zo.SamplerName = "rademacher") -> Algorithm:
    """Several directional derivatives of the gradient, along each client's own random signs; 64 by default.

    Args:
      learning_rate: η.
      sampler: family of raw perturbations.
    """
    directions = zo.Directions(zo.as_sampler(sampler), groups=None, block=0)
    return Algorithm(
        optax.chain(zo.scale_by_zo(sampler=directions), descent(learning_rate)), measure=projections(), perturbations=64
    )
