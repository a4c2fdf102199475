"""FedScalar (arXiv 2410.02260): a client sends its local progress as one scalar along a direction of its own.

m_i = (x_r − x_{i,K}) / (η_l K),   s_i = ⟨m_i, v_i⟩, v_i of random signs,   x ← x − η (1 / W) Σ_i w_i s_i v_i.
The paper's client sends ⟨x_{i,K} − x_r, v_i⟩ and the seed of v_i; here the seed follows from the round and the client's
place, and η = η_l K is the paper's server. Bytes a round: 4 up.
"""

import optax

from hiso_jax import channels, zo
from hiso_jax.algorithms._server import descent
from hiso_jax.fed.algorithm import Algorithm, default_rates, projections


@default_rates(digits=0.04)
def fed_scalar(
    learning_rate: optax.ScalarOrSchedule, *, sampler: zo.SamplerName = "rademacher", guard: bool = False
) -> Algorithm:
    """One projection of local progress a round, along each client's own random signs; 5 local steps by default.

    Args:
      learning_rate: η of the server; that of the clients is the run's own.
      sampler: family of raw perturbations.
      guard: clipping of messages more than three times as long as the cohort's median; off by default, since one scalar
        in twenty is so long.
    """
    directions = zo.Directions(zo.as_sampler(sampler), groups=None, block=0)
    return Algorithm(
        optax.chain(zo.scale_by_zo(sampler=directions), descent(learning_rate)),
        measure=projections(),
        rescale=(channels.guard(),) if guard else (),
        perturbations=1,
        local_steps=5,
    )
