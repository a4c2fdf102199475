"""Local mosaic: mosaic's message for clients that can backpropagate (arXiv 2410.02260, 2512.20814, 2409.06277).

x_{i,k+1} = x_{i,k} − η_l ∇f_i(x_{i,k}),   m_i = (x_r − x_{i,K}) / (η_l K),   s_{i,p} = ⟨m_i, z_{i,p}⟩, p < P; then as
``mosaic``: codes of b bits, clipping to the median length, Δ = (1 / W) Σ_i w_i φ_i (1/P) Σ_p ŝ_{i,p} z_{i,p},
x ← x − η Δ. Bytes a round: 4 + ⌈P·b / 8⌉ up, whatever K is. Local steps fit the differences between clients, and the
progress that they have in common remains, so few rounds are enough.
"""

from dataclasses import replace

import optax

from hiso_jax import zo
from hiso_jax.algorithms._wire_options import Groups
from hiso_jax.algorithms.mosaic import mosaic
from hiso_jax.fed.algorithm import Algorithm, default_rates, projections
from hiso_jax.fed.wire import Relay


@default_rates(perturbations=128, digits=4.0)
def local_mosaic(
    learning_rate: optax.ScalarOrSchedule,
    *,
    scalar_bits: int | None = None,
    bytes_up: int | None = None,
    clipping: bool = True,
    direction_groups: Groups = "own",
    direction_blocks: int | None = None,
    aggregate_bits: int | None = None,
    relay: Relay | None = None,
    sampler: zo.SamplerName = "gaussian",
    weight_decay: float = 0.0,
    momentum: float = 0.0,
) -> Algorithm:
    """Mosaic of local progress: 5 local steps by backpropagation, 128 directions and 20 bytes a round by default.

    Args:
      learning_rate: η of the server; that of the clients is the run's own.
      scalar_bits: bits of a scalar in a client's message, 1, 2, 4 or 8, beside one float32 step for all; 32 is floats
        and no step; by default as many as 20 bytes have room for, 1 for 128 scalars.
      bytes_up: as many bits a scalar as a message of so many bytes has room for.
      clipping: clip messages to their median length.
      direction_groups: number of groups of a cohort, each with directions of its own; own gives every client its own,
        shared is one group.
      direction_blocks: parameters whose signs are flipped together to make the groups' directions differ, by default up
        to 64; 0 draws every group's directions independently, at as many times the cost.
      aggregate_bits: bits of a value in the aggregate that the server broadcasts and applies, 4, 8 or 32.
      relay: whether the server broadcasts the clients' messages or their aggregate; by default the smaller if clients
        have directions of their own, and the aggregate if they share them.
      sampler: family of raw perturbations.
      weight_decay: decoupled weight decay on the server, added to the ascent direction; 0 is none.
      momentum: heavy-ball momentum on the server; 0 is none.
    """
    made = mosaic(
        learning_rate,
        scalar_bits=scalar_bits,
        bytes_up=bytes_up,
        clipping=clipping,
        direction_groups=direction_groups,
        direction_blocks=direction_blocks,
        aggregate_bits=aggregate_bits,
        relay=relay,
        sampler=sampler,
        weight_decay=weight_decay,
        momentum=momentum,
    )
    return replace(made, measure=projections(), perturbations=128, local_steps=5)
