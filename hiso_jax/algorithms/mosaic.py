"""Mosaic: many coarse directions, each client its own (arXiv 2306.10015, 2312.06353, 2409.16456; the plane is ours).

ĝ_{i,p} = (c_{i,p} + ½) a_i of b bits,   Δ = (1 / W) Σ_i w_i φ_i (1/P) Σ_p ĝ_{i,p} z_{i,p},   x ← x − η Δ, with φ_i the
clipping to the median length. Bytes a round: 4 + ⌈K·P·b / 8⌉ up; down those of every valid client, and C/8.
"""

import optax

from hiso_jax import channels, zo
from hiso_jax.algorithms._server import descent
from hiso_jax.algorithms._wire_options import Groups, grouped, message_bits
from hiso_jax.fed.algorithm import Algorithm, FewBits, default_rates
from hiso_jax.fed.wire import Relay


@default_rates(perturbations=64, digits=0.6, mnist=0.01, adapters=0.03)
def mosaic(
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
    """Mosaic, with 64 directions a local step unless a run says otherwise.

    Args:
      learning_rate: η.
      scalar_bits: bits of a scalar in a client's message, 1, 2, 4 or 8, beside one float32 step for all; 32 is floats
        and no step; by default as many as 20 bytes have room for, 2 for 64 scalars.
      bytes_up: as many bits a scalar as a message of so many bytes has room for.
      clipping: clip messages to their median length.
      direction_groups: number of groups of a cohort, each with directions of its own; own gives every client its own,
        shared is one group.
      direction_blocks: parameters whose signs are flipped together to tell one group's directions from another's, by
        default up to 64; 0 draws every group's directions independently, at as many times the cost.
      aggregate_bits: bits of a number in the aggregate that everyone is told and the server applies, 4, 8 or 32.
      relay: tell everyone the clients' messages, or their aggregate; by default the smaller where clients have
        directions of their own, and the aggregate where they share them. Messages show every client's scalars to all,
        and rule out secure aggregation.
      sampler: family of raw perturbations.
      weight_decay: decoupled weight decay on the server, added to the ascent direction; 0 is none.
      momentum: heavy-ball momentum on the server; 0 is none. Like everything on the server it costs no byte.
    """
    server = descent(learning_rate, weight_decay=weight_decay, momentum=momentum)
    algorithm = Algorithm(
        optax.chain(zo.scale_by_zo(sampler=sampler), server),
        rescale=(channels.clip_to_median(),) if clipping else (),
        wire=FewBits(**message_bits(scalar_bits, bytes_up), aggregate_bits=aggregate_bits or 32, relay=relay),
        perturbations=64,
        local_share=1 / 3,
    )
    return grouped(algorithm, direction_groups=direction_groups, direction_blocks=direction_blocks)
