"""Walls to the compiler, where the last bit matters."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

PIN = "pin"
"""The named scope of every pin, by which they can be counted in a compiled program."""


def pin(x: Array) -> Array:
    """Round ``x`` to its own dtype: nothing to the value, a wall to XLA.

    A run and a replay put the same formula into different programs, where XLA may or may not move a factor or rewrite
    a product, and the last bit parts. On CPU and TPU ``lax.reduce_precision`` at the dtype's own precision stands
    between and survives all passes; XLA's pipeline for GPUs removes it at its end and simplifies again (``u / sqrt(h)``
    became ``u · rsqrt(h)``). There the wall is the smaller of ``x`` and the largest finite number, which takes +∞ to
    that number and leaves all else: it fuses as if it were not there, where a selection or a barrier took a fifth or
    two more of a large model's memory (``benchmarks/README.md``). On CPU another wall would give other bits than
    ledgers that have been written.

    What generates the code behind XLA still contracts a product and a sum through ``reduce_precision``, in a run and
    its replay alike.
    """
    with jax.named_scope(PIN):
        return _pin.bind(x)


def _to_own_precision(x: Array) -> Array:
    info = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant)


def _at_most_the_largest(x: Array) -> Array:
    return lax.min(x, lax.full_like(x, jnp.finfo(x.dtype).max))


def rounded(x: Array) -> Array:
    """``x``, rounded before anything is added to it: a wall to fused multiply-adds, on any backend.

    A selection that only a NaN changes, into an infinity; no compiler can know that there is none, and none contracts
    through a selection. It costs nothing measurable beside a pass over memory.
    """
    return lax.select(x == x, x, lax.full_like(x, jnp.inf))


# A primitive and not ``lax.platform_dependent``: one equation and one operation where that makes a conditional.
_pin = Primitive("hiso_jax_pin")
_compiled = jax.jit(lambda x: _pin.bind(x))


@_pin.def_impl
def _alone(x: Array) -> Array:
    # Compiled also under jax.disable_jit(), where the function's own call would lead here again.
    with jax.disable_jit(False):
        return _compiled(x)


_pin.def_abstract_eval(lambda x: x)
batching.defvectorized(_pin)
ad.deflinear2(_pin, lambda cotangent, x: [cotangent])


def _lower_as(wall: Any, platform: str | None) -> None:
    mlir.register_lowering(_pin, mlir.lower_fun(wall, multiple_results=False), platform=platform, cacheable=False)


_lower_as(_to_own_precision, None)
_lower_as(_at_most_the_largest, "cuda")
_lower_as(_at_most_the_largest, "rocm")
