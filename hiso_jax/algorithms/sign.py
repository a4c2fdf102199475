"""One bit a scalar: clients send signs, the server their majority (FeedSign, arXiv 2501.17610; signSGD, 1810.05291).

ĝ_p = sign(Σ_i w_i sign(g_{i,p})),   Δ = (1/P) Σ_p ĝ_p u_p,   x ← x − η Δ.   Bytes a round: K·P/8 up, K·P/8 down.
"""

import optax

from hiso_jax import channels, zo
from hiso_jax.algorithms._server import descent
from hiso_jax.fed.algorithm import Algorithm, Wire, default_rates


@default_rates(digits=0.023, mnist=0.005)
def sign(
    learning_rate: optax.ScalarOrSchedule,
    *,
    sampler: zo.SamplerName = "gaussian",
    weight_decay: float = 0.0,
    momentum: float = 0.0,
) -> Algorithm:
    """Signs of the scalars, and their majority.

    Args:
      learning_rate: η; a step's length does not depend on the loss.
      sampler: family of raw perturbations.
      weight_decay: decoupled weight decay on the server, added to the ascent direction; 0 is none.
      momentum: heavy-ball momentum on the server, which costs no bytes; 0 is none.
    """
    server = descent(learning_rate, weight_decay=weight_decay, momentum=momentum)
    return Algorithm(
        optax.chain(zo.scale_by_zo(sampler=sampler), server),
        send=(channels.signs(),),
        combine=channels.majority(),
        wire=Wire(up_bits=1, down_bits=1),
    )
