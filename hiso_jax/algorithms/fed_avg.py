"""FedAvg (McMahan et al., arXiv 1602.05629): clients take K SGD steps by backpropagation, the server averages.

x_{i,k+1} = x_{i,k} − η ∇f_i(x_{i,k}),   x ← x − η_s Σ_i w_i (x − x_{i,K}) / Σ_i w_i.
With K = 1 it is FedSGD. Bytes a round: 4·d up, 4·d down, d the number of trained parameters.
"""

import optax

from hiso_jax.algorithms._local import gradients, local_sgd
from hiso_jax.algorithms._server import descent
from hiso_jax.checks import positive
from hiso_jax.fed.algorithm import Algorithm, Local, default_rates


@default_rates(digits=0.3)
def fed_avg(
    learning_rate: optax.ScalarOrSchedule,
    *,
    server_learning_rate: float = 1.0,
    momentum: float = 0.0,
) -> Algorithm:
    """FedAvg.

    Args:
      learning_rate: η of the clients' steps.
      server_learning_rate: η_s, learning rate of the server; 1 takes the clients' average.
      momentum: heavy-ball momentum on the server (FedAvgM, arXiv 1909.06335); 0 is none.
    """
    positive("server_learning_rate", server_learning_rate)
    server = descent(server_learning_rate, momentum=momentum)
    return Algorithm(server, measure=Local(local_sgd(learning_rate), gradients))
