"""A guard against oversized messages (norm bounding, Sun et al., arXiv 1911.07963).

Let R_i be the root mean square of client i's entries. The cap of a round is median_i R_i, kept within a factor of 1.5
of the median of the past caps. A message with R_i > 3 · cap is clipped to the cap; all others keep their bits. The
cohort's median limits a hostile minority, and the past caps limit a cohort with a hostile majority: neither huge
messages nor tiny ones, which would silence the others, move the cap far. The past is 32 rounds, so that an honest scale
may still grow by half in 16 rounds. The first cohort has no past and decides alone.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from hiso_jax.fed.algorithm import Clip
from hiso_jax.fed.norms import kinds, lengths, middle, to_length

REMEMBERED = 32
GROWTH = 1.5
# With ten honest clients of five Gaussian scalars each, fewer than one round in 10,000 has such an outlier.
OUTLIER = 3.0
# Smallest cohort with a meaningful median.
FEWEST = 3


def guard() -> Clip:
    """Messages over three times a cap, set by the cohort's median and past caps, are clipped to the cap."""
    return Clip(_factors, _none_yet, is_rare=True, label="guard")


def _none_yet(messages: PyTree) -> Float[Array, "n R"]:
    # Zero marks an unknown cap, because no cap is zero. NaN would stop a run with jax_debug_nans.
    return jnp.zeros((len(kinds(messages)), REMEMBERED), jnp.float32)


def _median(past: Float[Array, "R"]) -> Float[Array, ""]:
    """The median of the known caps; infinite if no cap is known."""
    # Snapshots of release 0.1 hold NaN for an unknown cap.
    known = past > 0
    ordered, count = jnp.sort(jnp.where(known, past, jnp.inf)), known.sum()
    return 0.5 * ordered[jnp.maximum(count - 1, 0) // 2] + 0.5 * ordered[count // 2]


def _factors(
    messages: PyTree, weights: Float[Array, "C"], caps: Float[Array, "n R"]
) -> tuple[Float[Array, "C"], Float[Array, "n R"]]:
    counts, factors, updated = weights > 0, [], []
    for own, past in zip((lengths(each, counts) for each in kinds(messages)), caps, strict=True):
        usual, now = _median(past).astype(own.dtype), middle(own, counts)
        known = jnp.isfinite(usual)
        bounded = jnp.where(known, jnp.clip(now, usual / GROWTH, GROWTH * usual), now)
        # The lower median of two clients is the shorter message, which must not silence the other client.
        alone = jnp.where(known, GROWTH * usual, jnp.inf)
        cap = jnp.where(counts.sum() < FEWEST, alone, bounded)
        factors.append(jnp.where(own > OUTLIER * cap, to_length(own, cap), 1))
        # A round with only zeros has no scale to remember.
        moved = jnp.append(past[1:], bounded.astype(past.dtype))
        updated.append(jnp.where(jnp.isfinite(now), moved, past))
    return jax.tree.reduce(jnp.minimum, factors), jnp.stack(updated)
