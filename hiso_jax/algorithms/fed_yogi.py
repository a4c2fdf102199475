"""FedYogi (Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295): Yogi on FedAvg's differences.

Δ = Σ_i w_i (x − x_{i,K}) / Σ_i w_i,   m ← β₁ m + (1 − β₁) Δ,
v ← v − (1 − β₂) Δ² sign(v − Δ²),   x ← x − η_s m̂ / (√v̂ + τ).
Bytes a round: 4·d up, 4·d down. The moments have optax's bias correction, which the paper omits.
"""

import optax

from hiso_jax.algorithms._local import gradients, local_sgd
from hiso_jax.checks import fraction, positive
from hiso_jax.fed.algorithm import Algorithm, Local, default_rates


@default_rates(digits=1.0)
def fed_yogi(
    learning_rate: optax.ScalarOrSchedule,
    *,
    server_learning_rate: float = 0.01,
    b1: float = 0.9,
    b2: float = 0.99,
    adaptivity: float = 1e-3,
) -> Algorithm:
    """FedYogi.

    Args:
      learning_rate: η of the clients' steps.
      server_learning_rate: η_s, learning rate of the server.
      b1: β₁, weight that the running mean of the differences keeps in each round.
      b2: β₂, weight that the running mean of the squared differences keeps in each round.
      adaptivity: τ, size below which differences count as small.
    """
    positive("server_learning_rate", server_learning_rate)
    positive("adaptivity", adaptivity)
    fraction("b1", b1)
    fraction("b2", b2)
    server = optax.yogi(server_learning_rate, b1=b1, b2=b2, eps=adaptivity)
    return Algorithm(server, measure=Local(local_sgd(learning_rate), gradients))
