"""FedAdagrad (Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295): Adagrad on FedAvg's differences.

Δ = Σ_i w_i (x − x_{i,K}) / Σ_i w_i,   v ← v + Δ²,   x ← x − η_s Δ / √(v + τ).
Bytes a round: 4·d up, 4·d down.
"""

import optax

from hiso_jax.algorithms._local import gradients, local_sgd
from hiso_jax.checks import positive
from hiso_jax.fed.algorithm import Algorithm, Local, default_rates


@default_rates(digits=1.0)
def fed_adagrad(
    learning_rate: optax.ScalarOrSchedule,
    *,
    server_learning_rate: float = 0.01,
    adaptivity: float = 1e-3,
) -> Algorithm:
    """FedAdagrad.

    Args:
      learning_rate: η of the clients' steps.
      server_learning_rate: η_s, learning rate of the server.
      adaptivity: τ, size below which differences count as small.
    """
    positive("server_learning_rate", server_learning_rate)
    positive("adaptivity", adaptivity)
    server = optax.adagrad(server_learning_rate, initial_accumulator_value=0.0, eps=adaptivity)
    return Algorithm(server, measure=Local(local_sgd(learning_rate), gradients))
