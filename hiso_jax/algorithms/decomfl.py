"""DeComFL (arXiv 2405.15861): shared isotropic directions, the mean of the clients' scalars, plain descent.

Δ = (1/P) Σ_p ĝ_p u_p,   x ← x − η Δ.   Bytes a round: 4·K·P up, 4·K·P down.
"""

import optax

from hiso_jax import zo
from hiso_jax.algorithms._server import descent
from hiso_jax.fed.algorithm import Algorithm, default_rates


@default_rates(digits=0.03, mnist=0.001, full=5e-6, adapters=1e-2)
def decomfl(
    learning_rate: optax.ScalarOrSchedule,
    *,
    sampler: zo.SamplerName = "gaussian",
    weight_decay: float = 0.0,
    momentum: float = 0.0,
) -> Algorithm:
    """DeComFL.

    Args:
      learning_rate: η.
      sampler: family of raw perturbations.
      weight_decay: decoupled weight decay on the server, added to the ascent direction; 0 is none.
      momentum: heavy-ball momentum on the server, which costs no bytes; 0 is none.
    """
    server = descent(learning_rate, weight_decay=weight_decay, momentum=momentum)
    return Algorithm(optax.chain(zo.scale_by_zo(sampler=sampler), server))
