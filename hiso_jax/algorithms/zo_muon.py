"""ZO-Muon (arXiv 2602.17155): matrices measured in a held subspace and updated by the orthogonal factor of Δ.

z = B_p Qᵀ, Q [n, r] orthonormal and new every ν rounds,   Δ = (1/P) Σ_p ĝ_p z_p,   W ← W − η NS₅(Δ). NS₅(Δ) is NS₅ of
the estimate in the subspace, times Qᵀ. Vectors v ← v − s η Δ, z gaussian. Q acts on a matrix's last axis, the outputs.
Bytes a round: 4·K·P up, 4·K·P down; memory: n·r entries a matrix. The authors' code is OPTML-Group/ZO-Muon.
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
    """A head that measures in subspaces of ``rank`` dimensions and renews them every ``hold_rounds`` rounds.

    Raises:
      ValueError: ``rank`` or ``hold_rounds`` < 1.
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
    """ZO-Muon, with four directions a step by default.

    Args:
      learning_rate: η of the matrices.
      rank: r, dimension of the subspaces, at most a matrix's last axis.
      hold_rounds: ν, number of rounds for which a subspace is held.
      vector_share: s, learning rate of the vectors in units of η; the default is the authors' for images, theirs for
        language models is 1e-5.
    """
    finite("vector_share", vector_share)

    def orthogonal(delta: PyTree, state: optax.EmptyState, params: PyTree = None) -> tuple[PyTree, optax.EmptyState]:
        return of_matrices(newton_schulz, lambda v: zo.rounded(jnp.asarray(vector_share, v.dtype) * v), delta), state

    matrices = optax.GradientTransformation(lambda params: optax.EmptyState(), orthogonal)
    return Algorithm(optax.chain(held(rank, hold_rounds), matrices, descent(learning_rate)), perturbations=4)
