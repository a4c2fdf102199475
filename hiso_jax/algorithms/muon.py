"""Muon (K. Jordan et al. 2024, arXiv 2502.16982) on the rebuilt ascent direction: a control of ZO-Muon (2602.17155).

M ← β M + (1 − β) Δ,   x ← x − η max(1, n/m)^{1/2} NS₅(β M + (1 − β) Δ) for matrices of m × n, NS₅ five Newton-Schulz
steps towards the orthogonal factor; vectors and convolutions take Adam's step. The control lacks ZO-Muon's directions
in held subspaces. Bytes a round: 4·K·P up, 4·K·P down; memory: one copy of the parameters.
"""

from typing import Any

import jax
import optax
import optax.contrib
from jaxtyping import PyTree

from hiso_jax import zo
from hiso_jax.checks import fraction, rate
from hiso_jax.fed.algorithm import Algorithm, default_rates
from hiso_jax.stacked import is_stacked


def _axes(params: PyTree) -> PyTree:
    """The row and column axes of every matrix, layer by layer; None for a leaf that takes Adam's step."""

    def node(at: Any) -> PyTree:
        layers = int(is_stacked(at))
        axes = optax.contrib.MuonDimensionNumbers(layers, layers + 1)
        return jax.tree.map(lambda x: axes if x.ndim - layers == 2 and x.size else None, at)

    return jax.tree.map(node, params, is_leaf=is_stacked)


@default_rates(digits=0.01, mnist=0.0027)
def muon(
    learning_rate: optax.ScalarOrSchedule, *, beta: float = 0.95, sampler: zo.SamplerName = "gaussian"
) -> Algorithm:
    """The Muon of optax, behind a head of scalars.

    Args:
      learning_rate: η.
      beta: β, weight that the running mean of the ascent directions keeps in each round.
      sampler: family of raw perturbations.
    """
    rate("learning_rate", learning_rate)
    fraction("beta", beta)
    server = optax.contrib.muon(learning_rate, beta=beta, muon_weight_dimension_numbers=_axes)
    return Algorithm(optax.chain(zo.scale_by_zo(sampler=sampler), server))
