"""Just One Byte (arXiv 2306.10015): every client has its own directions and sends one byte a scalar.

Δ = (1/C) Σ_i (1/P) Σ_p ĝ_{i,p} u_{i,p},   x ← x − η Δ. ĝ_{i,p} has 8 bits, in units of a step that the message carries;
the authors' code sends the float. Bytes a round: 4 + K·P up; down the messages of all valid clients.
"""

import optax

from hiso_jax import zo
from hiso_jax.algorithms._server import descent
from hiso_jax.fed.algorithm import Algorithm, FewBits, default_rates


@default_rates(digits=0.05, mnist=0.001)
def just_one_byte(
    learning_rate: optax.ScalarOrSchedule, *, sampler: zo.SamplerName = "gaussian", weight_decay: float = 0.0
) -> Algorithm:
    """Just One Byte.

    Args:
      learning_rate: η.
      sampler: family of raw perturbations.
      weight_decay: decoupled weight decay on the server, added to the ascent direction; 0 is none.
    """
    directions = zo.Directions(zo.as_sampler(sampler), groups=None, block=0)
    server = descent(learning_rate, weight_decay=weight_decay)
    return Algorithm(optax.chain(zo.scale_by_zo(sampler=directions), server), wire=FewBits(scalar_bits=8))
