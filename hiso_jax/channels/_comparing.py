"""What combiners share that compare whole messages with one another."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key, PyTree

from hiso_jax.channels._shares import least_above
from hiso_jax.fed.norms import rows_of

# A cohort of up to so many clients is compared with itself, a larger one with so many that are drawn from it: the
# quadratic cost ends there. 10,000 clients, each with 1,024 peers, took five times as long as the round before.
WHOLE = 512
DRAWN = 128


def krum_scores(messages: PyTree, counts: Bool[Array, "C"], hostile: float, key: Key[Array, ""]) -> Float[Array, "C"]:
    """The sum of a message's squared distances to its nearest peers (Blanchard et al., arXiv 1703.02757).

    Of n that count, f = ⌈hostile · n⌉ of them hostile, the n − f − 2 nearest are summed, at least one. A cohort of more
    than 512 is compared with 128 of its members that ``key`` draws, of those that count first, so that the cost is
    linear in its size.

    Returns:
      The scores, infinite of a message that does not count, and finite of every other: one without peers, or whose
      distances are beyond a float, has the largest float there is.
    """
    rows, clients = rows_of(messages, counts), len(counts)
    peers = jnp.arange(clients)
    if clients > WHOLE:
        drawn = jax.random.permutation(key, clients)
        peers = drawn[jnp.argsort(~counts[drawn], stable=True)[:DRAWN]]
    others, present = rows[peers], counts[peers]
    total = present.sum()
    nearest = jnp.maximum(total - least_above(hostile, total, len(peers)) - 2, 1)

    def score(each: tuple[Array, Array]) -> Array:
        own, place = each
        away = jnp.where(present & (peers != place), jnp.square(others - own[None]).sum(1), jnp.inf)
        near = jnp.sort(away)
        return jnp.where(jnp.arange(len(near)) < nearest, near, 0).sum()

    scores = lax.map(score, (rows, jnp.arange(clients)), batch_size=64)
    largest = jnp.finfo(scores.dtype).max
    return jnp.where(counts, jnp.where(scores < largest, scores, largest), jnp.inf)
