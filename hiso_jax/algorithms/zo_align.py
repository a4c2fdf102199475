"""ZO-Align (arXiv 2509.15552): the gradient's projection on the span of a step's directions, in place of their mean.

Δ = U (Uᵀ U)⁻¹ ĝ,   x ← x − η Δ, U = (u_1 … u_P). The step minimises f's quadratic bound of curvature 1/η on
x + span(U), and Δ is also the shortest least-squares solution of Uᵀ Δ = ĝ. For d parameters Uᵀ U is about d I, so for
P ≪ d this is DeComFL with η P / d. Bytes a round: 4·K·P up, 4·K·P down; memory: a step's P directions, and P ≤ d.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Float, PyTree

from hiso_jax import zo
from hiso_jax.algorithms._server import descent
from hiso_jax.checks import ParameterError
from hiso_jax.fed.algorithm import Algorithm, default_rates


def _products(directions: zo.GroupedDirections, count: int) -> Float[Array, "P P"]:
    """Uᵀ U of a step's ``count`` directions."""
    # At least two iterations: XLA inlines a loop of one, which may then sum in another order.
    each = lax.map(directions.of, jnp.arange(max(count, 2)) % count)
    flat = [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(each)]
    # Highest precision: accelerators would round the operands, and Uᵀ Δ would differ from ĝ.
    return jax.tree.reduce(jnp.add, [jnp.matmul(u, u.T, precision="highest") for u in flat])[:count, :count]


def _head() -> optax.GradientTransformationExtraArgs:
    measured = zo.scale_by_zo()

    def update(updates: Any, state: zo.ScaleByZoState, params: Any = None, **extra: Any) -> tuple[PyTree, Any]:
        if params is None or extra.get("key") is None:
            return measured.update(updates, state, params, **extra)  # its error names the missing argument
        steps, count = updates.shape
        size, clients = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)), extra.get("clients")
        if count > size:
            raise ParameterError("perturbations", f"must be at most {size} in all groups, the parameters; got {count}")
        groups = 1 if clients is None else state.directions.groups_of(clients)

        def aligned(term: tuple[Array, Array]) -> Array:
            step, row = term
            directions = zo.GroupedDirections(
                state.directions, extra["key"], step, params, None, groups, count // groups
            )
            return count * cho_solve(cho_factor(_products(directions, count)), row)

        # ``aligned`` multiplies by ``count`` because the head divides by it.
        weights = lax.map(aligned, (jnp.arange(steps), updates))
        return measured.update(weights, state, params, **extra)

    return optax.GradientTransformationExtraArgs(measured.init, update)


@default_rates(digits=14.0, mnist=3.5)
def zo_align(learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 0.0) -> Algorithm:
    """ZO-Align, along Gaussian directions.

    Args:
      learning_rate: η, d / P times DeComFL's.
      weight_decay: decoupled weight decay on the server, added to the ascent direction; 0 is none.
    """
    return Algorithm(optax.chain(_head(), descent(learning_rate, weight_decay=weight_decay)))
