"""ZO-MOPI (arXiv 2605.09034): ZO-Muon's directions, momentum, and one power iteration in place of Newton-Schulz.

z = B_p Qᵀ as in ZO-Muon,   M ← β M + (1 − β) Δ,   V ← QR(M Mᵀ V), k columns,   U = Mᵀ V with columns of length 1,
W ← W − η V Uᵀ; vectors v ← v − s η M. M (as the first Δ) and V restart with every Q; the authors' code
(MOFA-LAB/ZO-MOPI) discards V and leaves M in the old coordinates. Bytes a round: 4·K·P up and down; memory: M, V and Q.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from hiso_jax import zo
from hiso_jax.algorithms._matrices import AXES, basis_key, of_matrices
from hiso_jax.algorithms._server import descent, moving_average
from hiso_jax.algorithms.zo_muon import held
from hiso_jax.checks import finite, fraction, integer
from hiso_jax.fed.algorithm import Algorithm, default_rates


class _State(NamedTuple):
    rounds: Int[Array, ""]
    momentum: PyTree
    axes: PyTree


def _first_axes(params: PyTree, components: int) -> PyTree:
    """Random orthonormal first axes V along the rows of every matrix."""
    turned = of_matrices(jnp.transpose, lambda x: x, params, as_leaf=False)
    return zo.subspaces(basis_key(AXES), turned, components)


def _power_iteration(beta: float, components: int, hold_rounds: int, share: float) -> optax.GradientTransformation:
    def init(params: PyTree) -> _State:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, zo.working_dtype(x)), params)
        return _State(jnp.zeros([], jnp.int32), zeros, _first_axes(params, components))

    def update(delta: PyTree, state: _State, params: PyTree = None) -> tuple[PyTree, _State]:
        new = state.rounds % hold_rounds == 0
        momentum = jax.tree.map(lambda m, d: jnp.where(new, d, moving_average(m, d, beta)), state.momentum, delta)
        begun = jax.lax.cond(new, lambda: _first_axes(delta, components), lambda: state.axes)
        axes = of_matrices(lambda m, v: jnp.linalg.qr(m @ (m.T @ v))[0], lambda m, v: v, momentum, begun, as_leaf=False)

        def factor(m: Array, v: Array) -> Array:
            u = m.T @ v
            return v @ (u / jnp.maximum(jnp.linalg.norm(u, axis=0), jnp.finfo(u.dtype).tiny)[None]).T

        ascent = of_matrices(factor, lambda m, v: zo.rounded(jnp.asarray(share, m.dtype) * m), momentum, axes)
        return ascent, _State(optax.safe_increment(state.rounds), momentum, axes)

    return optax.GradientTransformation(init, update)


@default_rates(digits=0.033, mnist=0.02)
def zo_mopi(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int = 64,
    hold_rounds: int = 50,
    beta: float = 0.9,
    components: int = 4,
    vector_share: float = 0.01,
) -> Algorithm:
    """ZO-MOPI, with four directions a step by default.

    Args:
      learning_rate: η of the matrices.
      rank: r, dimension of the subspaces, at most a matrix's last axis.
      hold_rounds: ν, number of rounds for which a subspace is held.
      beta: β, weight that the momentum keeps in each round.
      components: k, number of components in the power iteration.
      vector_share: s, learning rate of the vectors in units of η.
    """
    fraction("beta", beta)
    integer("components", components, 1)
    finite("vector_share", vector_share)
    server = _power_iteration(beta, components, hold_rounds, vector_share)
    return Algorithm(optax.chain(held(rank, hold_rounds), server, descent(learning_rate)), perturbations=4)
