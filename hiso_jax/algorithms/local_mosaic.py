"""Local mosaic: mosaic's message for clients that can backpropagate (arXiv 2410.02260, 2512.20814, 2409.06277).

x_{i,k+1} = x_{i,k} − η_l ∇f_i(x_{i,k}),   m_i = (x_r − x_{i,K}) / (η_l K),   s_{i,p} = ⟨m_i, z_{i,p}⟩, p < P; then as
``mosaic``: codes of b bits, clipping to the median length, Δ = (1 / W) Σ_i w_i φ_i (1/P) Σ_p ŝ_{i,p} z_{i,p},
x ← x − η Δ. Bytes a round: 4 + ⌈P·b / 8⌉ up, whatever K is. Local steps fit the differences between clients, and the
progress that they have in common remains, so few rounds are enough. The directions are rows of a Hadamard matrix, along
which a client projects in one pass over its progress, however many they are.
"""

from dataclasses import replace
from functools import wraps
from inspect import signature
from typing import Any

import optax

from hiso_jax.algorithms.mosaic import mosaic
from hiso_jax.fed.algorithm import Algorithm, default_rates, projections

SAMPLER = "hadamard"


@default_rates(perturbations=128, digits=6.0, mnist=0.2, adapters=0.3)
# The options of ``mosaic`` are its options, with another default of the sampler.
@wraps(mosaic, assigned=["__annotations__"], updated=())
def local_mosaic(learning_rate: optax.ScalarOrSchedule, **options: Any) -> Algorithm:
    """Mosaic of local progress: 5 local steps by backpropagation, 128 directions and 20 bytes a round by default.

    Args:
      learning_rate: η of the server; that of the clients is the run's own.
      options: those of :func:`hiso_jax.algorithms.mosaic`.
    """
    made = mosaic(learning_rate, **{"sampler": SAMPLER, **options})
    return replace(made, measure=projections(), perturbations=128, local_steps=5)


_options = signature(mosaic).parameters.values()
_own = [each.replace(default=SAMPLER) if each.name == "sampler" else each for each in _options]
vars(local_mosaic)["__signature__"] = signature(mosaic).replace(parameters=_own)
