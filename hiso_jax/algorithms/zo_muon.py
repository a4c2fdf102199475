"""ZO-Muon (arXiv 2602.17155): matrices measured in a subspace that is held, and moved by their orthogonal factor.

z = B_p Qᵀ, Q [n, r] orthonormal and new every ν rounds,   Δ = (1/P) Σ_p ĝ_p z_p,   W ← W − η NS₅(Δ), which is NS₅ of
the estimate in the subspace times Qᵀ; vectors v ← v − s η Δ, z gaussian. Q is of a matrix's last axis, the outputs.
Bytes a round: 4·K·P up, 4·K·P down; memory: n·r numbers a matrix. Its code: OPTML-Group/ZO-Muon.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from hiso_jax import zo
from hiso_jax.algorithms._matrices import basis_key, newton_schulz, of_matrices
from hiso_jax.algorithms._server import descent
from hiso_jax.checks import finite, integer
from hiso_jax.fed.algorithm import Algorithm, default_rates


def held(rank: int, hold_rounds: int) -> optax.GradientTransformationExtraArgs:
    """A head that measures in subspaces of ``rank`` dimensions, others after so many rounds.

    Raises:
      ValueError: one of them < 1.
    """
    integer("rank", rank, 1)
    integer("hold_rounds", hold_rounds, 1)

    def advance(bases: PyTree, delta: PyTree, step: zo.LocalStep) -> PyTree:
        done = step.rounds + 1

        def renewed() -> PyTree:
            return zo.subspaces(basis_key(done // hold_rounds), delta, rank)

        return jax.lax.cond(done % hold_rounds == 0, renewed, lambda: bases)

    def first(params: PyTree) -> PyTree:
        return zo.subspaces(basis_key(0), params, rank)

    return zo.head(sampler=zo.Subspace(rank), curvature=first, advance=advance)


@default_rates(digits=0.1, mnist=0.03)
def zo_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int = 64,
    hold_rounds: int = 100,
    vector_share: float = 0.01,
) -> Algorithm:
    """ZO-Muon, with four directions a step unless a run says otherwise.

    Args:
      learning_rate: η of the matrices.
      rank: r of the subspaces, at most a matrix's last axis.
      hold_rounds: ν, for which a subspace is held.
      vector_share: s, the vectors' rate in units of η; as in its code for images, for language models it is 1e-5.
    """
    finite("vector_share", vector_share)

    def orthogonal(delta: PyTree, state: optax.EmptyState, params: PyTree = None) -> tuple[PyTree, optax.EmptyState]:
        return of_matrices(newton_schulz, lambda v: zo.rounded(jnp.asarray(vector_share, v.dtype) * v), delta), state

    matrices = optax.GradientTransformation(lambda params: optax.EmptyState(), orthogonal)
    return Algorithm(optax.chain(held(rank, hold_rounds), matrices, descent(learning_rate)), perturbations=4)
