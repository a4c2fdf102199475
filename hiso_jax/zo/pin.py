"""A wall to the compiler, where the last bit matters."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def pin(x: Array) -> Array:
    """Round ``x`` to its own dtype: nothing to the value, a wall to the compiler.

    A run and a replay put the same formula into different programs, where XLA may or may not contract a product
    and a sum into one fused multiply-add, and the last bit parts. ``lax.reduce_precision`` at the dtype's own
    precision stands between the two and survives compilation; ``lax.optimization_barrier`` is dropped on CPU.
    """
    info = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant)
