"""FedProx (Li et al., arXiv 1812.06127): FedAvg with a pull of clients towards the server's parameters.

x_{i,k+1} = x_{i,k} − η (∇f_i(x_{i,k}) + ρ (x_{i,k} − x)),   x ← the weighted mean of x_{i,K}.
Bytes a round: 4·d up, 4·d down. It differs from FedAvg only for K > 1.
"""

import optax

from hiso_jax.algorithms._local import gradients, local_sgd
from hiso_jax.checks import finite
from hiso_jax.fed.algorithm import Algorithm, Local, default_rates


@default_rates(digits=0.3)
def fed_prox(learning_rate: optax.ScalarOrSchedule, *, proximal: float = 0.01) -> Algorithm:
    """FedProx.

    Args:
      learning_rate: η of the clients' steps.
      proximal: ρ, weight of the pull (μ in the paper).
    """
    finite("proximal", proximal)
    return Algorithm(optax.sgd(1.0), measure=Local(local_sgd(learning_rate, proximal=proximal), gradients))
