"""Mosaic: many own directions for each client, with coarse scalars (arXiv 2306.10015, 2312.06353, 2409.16456).

ĝ_{i,p} = (c_{i,p} + ½) a_i of b bits,   Δ = (1 / W) Σ_i w_i φ_i (1/P) Σ_p ĝ_{i,p} z_{i,p},   x ← x − η Δ, where φ_i
clips to the median length. The combination of directions and bits is ours.
Bytes a round: 4 + ⌈K·P·b / 8⌉ up; down the messages of all valid clients, and C/8.
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
    """Mosaic, with 64 directions a local step by default.

    Args:
      learning_rate: η.
      scalar_bits: bits of a scalar in a client's message, 1, 2, 4 or 8, with one float32 step for all scalars; 32 means
        floats without a step; by default as many bits as fit in 20 bytes, such as 2 for 64 scalars.
      bytes_up: largest size of a client's message in bytes; a scalar gets as many bits as fit.
      clipping: clipping of messages to their median length.
      direction_groups: number of groups of a cohort, each with its own directions; own gives every client its own
        directions, shared is one group.
      direction_blocks: number of parameters whose signs are flipped together to distinguish the directions of groups,
        by default up to 64; 0 draws every group's directions independently, at a cost proportional to the groups.
      aggregate_bits: bits of an entry in the aggregate that the server broadcasts and applies, 4, 8 or 32.
      relay: content of the server's broadcast, the clients' messages or their aggregate; by default the smaller if
        clients have their own directions, else the aggregate. Messages reveal every client's scalars to all clients
        and rule out secure aggregation.
      sampler: family of raw perturbations.
      weight_decay: decoupled weight decay on the server, added to the ascent direction; 0 is none.
      momentum: heavy-ball momentum on the server, which costs no bytes; 0 is none.
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
