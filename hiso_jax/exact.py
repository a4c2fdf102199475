"""Walls that the compiler does not optimize across, where the last bit matters."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

PIN = "pin"
"""The named scope of every pin, by which pins can be counted in a compiled program."""


def pin(x: Array) -> Array:
    """Round ``x`` to its own dtype: the value stays the same, and XLA does not simplify across it.

    A run and a replay compile the same formula in different programs. XLA may move a factor or rewrite a product in
    only one of them, and then the last bits differ. On CPU and TPU, ``lax.reduce_precision`` at the dtype's own
    precision is a wall that survives all passes. XLA's pipeline for GPUs removes it at its end and simplifies again
    (``u / sqrt(h)`` became ``u · rsqrt(h)``). There the wall is the minimum of ``x`` and the largest finite number,
    which maps +∞ to that number and leaves all other values. The minimum does not hinder fusion, but a selection or a
    barrier took a fifth or two more of a large model's memory (``docs/reference/benchmarks``). On CPU another wall
    would give other bits than those of existing ledgers.

    The code generator behind XLA still contracts a product and a sum through ``reduce_precision``, both in a run and
    in its replay.
    """
    with jax.named_scope(PIN):
        return _pin.bind(x)


def _to_own_precision(x: Array) -> Array:
    info = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant)


def _at_most_the_largest(x: Array) -> Array:
    return lax.min(x, lax.full_like(x, jnp.finfo(x.dtype).max))


def rounded(x: Array) -> Array:
    """``x``, rounded before anything is added to it: a wall against fused multiply-adds, on any backend.

    It is a selection that changes only a NaN, into an infinity. A compiler cannot know that ``x`` has no NaN, and no
    compiler contracts through a selection. Compared with a pass over memory, its cost is not measurable.
    """
    return lax.select(x == x, x, lax.full_like(x, jnp.inf))


# A primitive is one equation and one operation; ``lax.platform_dependent`` would make a conditional.
_pin = Primitive("hiso_jax_pin")
_compiled = jax.jit(lambda x: _pin.bind(x))


@_pin.def_impl
def _alone(x: Array) -> Array:
    # Compiled even under jax.disable_jit(), where the call would otherwise come back here.
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
