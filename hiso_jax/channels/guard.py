"""A guard against messages out of all proportion (norm bounding, Sun et al., arXiv 1911.07963).

With R_i the root mean square of client i's numbers, the cap of a round is min(median_i R_i, 1.5 · median of the past
caps); a message with R_i > 3 · cap is shortened to the cap, and the others stay as they are, to the bit. The first term
bounds what a minority can do, the second a round in which the hostile are the majority of a cohort. The past caps are
the last 32, so that an honest scale may still grow by half in 16 rounds.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from hiso_jax.fed.algorithm import Rescale
from hiso_jax.fed.norms import kinds, lengths, middle, to_length

REMEMBERED = 32
GROWTH = 1.5
# Of ten honest clients with five Gaussian scalars each one is so far out in less than one round of 10,000.
OUTLIER = 3.0


def guard() -> Rescale:
    """Messages three times as long as a cap that the cohort's median and the past set are shortened to it."""
    return Rescale(_factors, _none_yet, is_rare=True)


def _none_yet(messages: PyTree) -> Float[Array, "n R"]:
    return jnp.full((len(kinds(messages)), REMEMBERED), jnp.nan, jnp.float32)


def _factors(
    messages: PyTree, weights: Float[Array, "C"], caps: Float[Array, "n R"]
) -> tuple[Float[Array, "C"], Float[Array, "n R"]]:
    counts, factors, updated = weights > 0, [], []
    for own, past in zip((lengths(each, counts) for each in kinds(messages)), caps, strict=True):
        usual = GROWTH * jnp.nanmedian(past)
        now = middle(own, counts)
        cap = jnp.where(usual < now, usual.astype(now.dtype), now)
        factors.append(jnp.where(own > OUTLIER * cap, to_length(own, cap), 1))
        # A round of zeros only has no scale to remember.
        moved = jnp.append(past[1:], cap.astype(past.dtype))
        updated.append(jnp.where(jnp.isfinite(now), moved, past))
    return jax.tree.reduce(jnp.minimum, factors), jnp.stack(updated)
