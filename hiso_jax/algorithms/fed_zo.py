"""FedZO (Fang et al., arXiv 2201.09531): clients take local zeroth-order steps and send vectors of all parameters.

g = (1/P) Σ_p [f_i(x + μ u_p) − f_i(x)] / μ · u_p,   x_{i,k+1} = x_{i,k} − η g,   x ← the weighted mean of x_{i,K}.
Every client draws its own directions, uniform on each parameter's sphere of radius √d (the paper: on one sphere).
Bytes a round: 4·d up, 4·d down; forward passes: K·(P + 1).
"""

from typing import Any

import optax
from jaxtyping import Array, Float, PyTree

from hiso_jax import zo
from hiso_jax.algorithms._local import local_sgd
from hiso_jax.fed.algorithm import Algorithm, Local, LocalClient, default_rates


def fed_zo_estimate(client: LocalClient, params: PyTree, batch: Any, step: Array) -> tuple[Float[Array, ""], PyTree]:
    """The forward-difference estimate of a client's gradient."""
    loss, scalars = zo.scalars(
        client.loss,
        params,
        batch,
        client.key,
        step=step,
        num_perturbations=client.num_perturbations,
        mu=client.mu,
        sampler="sphere",
    )
    return loss, zo.accumulate(client.key, scalars, params, step=step, sampler="sphere")


@default_rates(digits=0.03, mnist=0.003)
def fed_zo(learning_rate: optax.ScalarOrSchedule) -> Algorithm:
    """FedZO.

    Args:
      learning_rate: η of the clients' steps.
    """
    train = local_sgd(learning_rate, fed_zo_estimate)
    measure = Local(train, lambda steps, perturbations: steps * (perturbations + 1), ("perturbations", "mu"))
    return Algorithm(optax.sgd(1.0), measure=measure)
