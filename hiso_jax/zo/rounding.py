"""Stochastic rounding, so that small updates of low-precision parameters are not lost.

At η = 5e-6 no weight near 0.04 changes in bfloat16: every update is below half a unit in the last place. Rounding up or
down with proportional probabilities keeps the mean of the updates (Gupta et al., arXiv 1502.02551). The random bits
come from the round key, so that a replay rounds in the same way.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Key, PyTree, Shaped, UInt32

from hiso_jax.exact import rounded
from hiso_jax.factored import Factors, is_factors
from hiso_jax.zo.directions import draw_leaves, leaves_of
from hiso_jax.zo.samplers import random_words
from hiso_jax.zo.threefry import fold_in

# Local steps are below 2³¹, so no direction of the round has these keys.
PARAMETERS_STREAM = 0x80D30001
CURVATURE_STREAM = 0x80D30002


def stochastic_round(words: UInt32[Array, "..."], x: Float[Array, "..."]) -> BFloat16[Array, "..."]:
    """``x`` in bfloat16, rounded up or down at random so that the mean is ``x``; infinities and NaNs are kept.

    Args:
      words: random bits, one word for each element.
      x: float32 or wider.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    # Floats are sign and magnitude: adding random bits and cutting rounds the magnitude up with the right probability.
    cut = (bits + (words >> 16)) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(cut, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def store(
    round_key: Key[Array, ""], stream: int, tree: PyTree[Shaped[Array, "..."]], like: PyTree[Shaped[Array, "..."]]
) -> PyTree[Shaped[Array, "..."]]:
    """``tree`` in the dtypes of ``like``: bfloat16 leaves are rounded stochastically, all others are cast.

    Args:
      round_key: the key of the round.
      stream: a number that separates this rounding from others in the round.
      tree: the tree to store.
      like: a tree of the same structure; only its shapes and dtypes are read.
    """
    if all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(like)):
        return jax.tree.map(lambda x, kept: x.astype(kept.dtype), tree, like)
    key = fold_in(round_key, jnp.uint32(stream))
    words = draw_leaves(key, like, lambda leaf_key, shape, leaf: random_words(leaf_key, shape))

    def one(x: Array | Factors, kept: Array | Factors, noise: Array) -> Array | Factors:
        if isinstance(x, Factors):  # a curvature's factors are small and never in bfloat16
            return x
        return stochastic_round(noise, x) if kept.dtype == jnp.bfloat16 else x.astype(kept.dtype)

    leaves = zip(leaves_of(tree), leaves_of(like), words, strict=True)
    structure = jax.tree.structure(tree, is_leaf=is_factors)
    return jax.tree.unflatten(structure, [one(*leaf) for leaf in leaves])


def apply_updates(
    params: PyTree[Shaped[Array, "..."]], updates: PyTree[Shaped[Array, "..."]], round_key: Key[Array, ""]
) -> PyTree[Shaped[Array, "..."]]:
    """``params + updates`` as ``optax.apply_updates``, but bfloat16 parameters are rounded stochastically.

    Args:
      params: the parameters.
      updates: in the same structure, float32 or wider.
      round_key: the key of the round, from which the rounding is drawn.
    """
    # The update's product with the learning rate is rounded first, so that backends agree if all others are exact.
    moved = jax.tree.map(lambda x, u: x.astype(jnp.promote_types(x.dtype, u.dtype)) + rounded(u), params, updates)
    return store(round_key, PARAMETERS_STREAM, moved, params)


def like_before(after: PyTree, before: PyTree) -> PyTree:
    """An optimizer's state in its dtypes before the update, because optax widens states that start as bfloat16.

    A loop over rounds then has one program and may be a scan. Moments that start in float32 stay in float32.

    Args:
      after: the state after an update.
      before: the state before the update.
    """
    return jax.tree.map(lambda new, old: new if new.dtype == old.dtype else new.astype(old.dtype), after, before)
