"""Random keys as arrays of integers (words), which can be copied, transferred, hashed and written."""

from typing import Any

import jax
import jax.numpy as jnp


def is_key(leaf: Any) -> bool:
    """Whether ``leaf`` is an array of typed random keys."""
    return jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)


def key_data(leaf: Any) -> Any:
    """The words of a random key, uint32 [..., n]; another leaf is returned unchanged."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def from_key_data(words: Any, like: Any) -> Any:
    """The inverse of :func:`key_data` for a leaf like ``like``."""
    return jax.random.wrap_key_data(jnp.asarray(words), impl=jax.random.key_impl(like)) if is_key(like) else words
