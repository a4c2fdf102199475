"""A guard against messages out of all proportion (norm bounding, Sun et al., arXiv 1911.07963).

With R_i the root mean square of client i's numbers, the cap of a round is median_i R_i, kept within a factor of 1.5 of
the median of the past caps; a message with R_i > 3 · cap is shortened to the cap, and the others stay as they are, to
the bit. The cohort bounds what a minority can do, the past what a cohort can whose majority is hostile: neither huge
messages nor tiny ones, which would silence the others, move the cap far. The past are 32 rounds, so that an honest
scale may still grow by half in 16. Before there is a past the first cohort decides alone.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from hiso_jax.fed.algorithm import Clip
from hiso_jax.fed.norms import kinds, lengths, middle, to_length

REMEMBERED = 32
GROWTH = 1.5
# Of ten honest clients with five Gaussian scalars each one is so far out in less than one round of 10,000.
OUTLIER = 3.0
# Clients of a cohort whose median says something.
FEWEST = 3


def guard() -> Clip:
    """Messages three times as long as a cap that the cohort's median and the past set are shortened to it."""
    return Clip(_factors, _none_yet, is_rare=True, label="guard")


def _none_yet(messages: PyTree) -> Float[Array, "n R"]:
    # No cap is zero. NaN would stop a user who looks for the first NaN with jax_debug_nans.
    return jnp.zeros((len(kinds(messages)), REMEMBERED), jnp.float32)


def _median(past: Float[Array, "R"]) -> Float[Array, ""]:
    """The median of the known caps; infinite if none is known."""
    # Snapshots of release 0.1 hold NaN for a cap that is not known yet.
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
        # Of two clients the lower median is the shorter, who must not silence the other.
        alone = jnp.where(known, GROWTH * usual, jnp.inf)
        cap = jnp.where(counts.sum() < FEWEST, alone, bounded)
        factors.append(jnp.where(own > OUTLIER * cap, to_length(own, cap), 1))
        # A round of zeros only has no scale to remember.
        moved = jnp.append(past[1:], bounded.astype(past.dtype))
        updated.append(jnp.where(jnp.isfinite(now), moved, past))
    return jax.tree.reduce(jnp.minimum, factors), jnp.stack(updated)
