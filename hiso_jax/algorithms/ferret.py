"""Ferret (arXiv 2409.06277): a client projects the progress of local steps block by block.

m_i = (x_r − x_{i,K}) / (η_l K),   s_{i,p} = ⟨m_i, v_{i,p}⟩ / √π_b,
x ← x − η (1 / W) Σ_i w_i (1/P) Σ_p s_{i,p} v_{i,p} / √π_b, where v_{i,p} is zero outside its block b, a leaf of the
parameters, drawn with probability π_b ∝ n_b. The paper's client takes seeds of a block in proportion to the norm of its
own update and sends their counts. Here the norms follow from earlier rounds, so that every party knows them without a
byte: n_b² ← γ n_b² + (1 − γ)‖Δ_b‖² π_b / d_b, from zero.
Bytes a round: 4 P up; memory: one number a block.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from hiso_jax import zo
from hiso_jax.algorithms._server import descent, moving_average
from hiso_jax.checks import between
from hiso_jax.fed.algorithm import Algorithm, default_rates, projections


@default_rates(perturbations=128, digits=4.0)
def ferret(
    learning_rate: optax.ScalarOrSchedule, *, norm_decay: float = 0.9, sampler: zo.SamplerName = "uniform"
) -> Algorithm:
    """Local progress projected on directions of one block each; 128 directions and 5 local steps by default.

    Args:
      learning_rate: η of the server; that of the clients is the run's own.
      norm_decay: γ, weight that the squared norms of the blocks keep in each round.
      sampler: family of the values within a block; uniform is the paper's truncated normal.
    """
    between("norm_decay", norm_decay, 0, 1)
    blocks = zo.Blocks(zo.as_sampler(sampler))

    def zeros(params: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.zeros([], zo.working_dtype(x)), params)

    def advance(squares: PyTree, delta: PyTree, step: Any) -> PyTree:
        leaves, structure = jax.tree.flatten(squares)
        # E‖Δ_b‖² ≈ d_b ‖m_b‖² / (P C π_b), so this is ‖m_b‖² but for a factor that all blocks share.
        found = zip(jax.tree.leaves(delta), blocks.shares(leaves), strict=True)
        new = [zo.rounded(zo.mean_square(leaf) * share) for leaf, share in found]
        mixed = [moving_average(x, y.astype(x.dtype), norm_decay) for x, y in zip(leaves, new, strict=True)]
        return jax.tree.unflatten(structure, mixed)

    directions = zo.Directions(blocks, groups=None, block=0)
    head = zo.head(sampler=directions, curvature=zeros, advance=advance)
    return Algorithm(optax.chain(head, descent(learning_rate)), measure=projections(), perturbations=128, local_steps=5)
