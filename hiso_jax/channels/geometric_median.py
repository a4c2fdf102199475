"""The geometric median (RFA, Pillutla et al., arXiv 1912.13445): the point with the smallest sum of distances.

v ← Σ_i w_i m_i / Σ_i w_i,   w_i = 1 / max(‖m_i − v‖, ν): smoothed Weiszfeld steps, from the coordinate-wise median.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key, PyTree

from hiso_jax.checks import integer
from hiso_jax.fed.algorithm import Combine
from hiso_jax.fed.norms import rows_of

# ν, as a share of the median distance from the first point.
SMOOTHING = 1e-6


def geometric_median(*, weiszfeld_steps: int = 32) -> Combine:
    """The point with the smallest sum of distances to the complete messages.

    Args:
      weiszfeld_steps: number of steps of the smoothed Weiszfeld iteration.

    Raises:
      ValueError: ``weiszfeld_steps`` < 1.
    """
    integer("weiszfeld_steps", weiszfeld_steps, 1)

    def combine(messages: PyTree, weights: Float[Array, "C"], key: Key[Array, ""]) -> PyTree:
        counts = weights > 0
        rows = rows_of(messages, counts)
        start = jnp.nan_to_num(jnp.nanmedian(jnp.where(counts[:, None], rows, jnp.nan), axis=0))

        def away(point: Array) -> Array:
            return jnp.linalg.norm(rows - point[None], axis=1)

        middle = jnp.nan_to_num(jnp.nanmedian(jnp.where(counts, away(start), jnp.nan)))
        least = jnp.where(middle > 0, SMOOTHING * middle, 1)

        def step(_: Array, point: Array) -> Array:
            share = jnp.where(counts, 1 / jnp.maximum(away(point), least), 0)
            total = share.sum()
            # A message at infinite distance has no weight.
            return jnp.where(share[:, None] > 0, rows * share[:, None], 0).sum(0) / jnp.where(total > 0, total, 1)

        found = lax.fori_loop(0, weiszfeld_steps, step, start)
        leaves, structure = jax.tree.flatten(messages)
        ends = np.cumsum([leaf[0].size for leaf in leaves])[:-1].tolist()
        parts = jnp.split(found, ends)
        shaped = [p.reshape(leaf.shape[1:]).astype(leaf.dtype) for p, leaf in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(structure, shaped)

    return Combine(combine, compares=True, label="geometric_median.<locals>.combine")
