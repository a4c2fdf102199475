"""Random keys as plain words: what is copied, moved, hashed or written is an array of numbers."""

from typing import Any

import jax
import jax.numpy as jnp


def is_key(leaf: Any) -> bool:
    """Whether ``leaf`` is an array of typed random keys."""
    return jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)


def key_data(leaf: Any) -> Any:
    """A random key's words, uint32 [..., n]; another leaf as it is."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def from_key_data(words: Any, like: Any) -> Any:
    """What :func:`key_data` took from a leaf like ``like``, back again."""
    return jax.random.wrap_key_data(jnp.asarray(words), impl=jax.random.key_impl(like)) if is_key(like) else words
