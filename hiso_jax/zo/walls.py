"""Walls to the compiler, where the last bit matters."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def pin(x: Array) -> Array:
    """Round ``x`` to its own dtype: nothing to the value, a wall to XLA.

    A run and a replay put the same formula into different programs, where XLA may or may not move a factor or rewrite
    a product, and the last bit parts. ``lax.reduce_precision`` at the dtype's own precision stands between and
    survives its passes; ``lax.optimization_barrier`` is dropped on CPU. What generates the code behind XLA still
    contracts a product and a sum through it, in a run and its replay alike: see :func:`rounded`.
    """
    info = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant)


def rounded(x: Array) -> Array:
    """``x``, rounded before anything is added to it: a wall to fused multiply-adds, on any backend.

    A selection that only a NaN changes, into an infinity; no compiler can know that there is none, and none contracts
    through a selection. It costs nothing measurable beside a pass over memory.
    """
    return jnp.where(x == x, x, jnp.asarray(jnp.inf, x.dtype))
