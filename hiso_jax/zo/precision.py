"""The float32 value of a half-precision loss, before its last rounding.

A scalar is a difference of two losses that differ by about μ. In bfloat16 neighbouring values near 1 are 0.008 apart,
so that the difference is only rounding error. JAX's reductions add half-precision values in float32 and round the sum;
the arithmetic that follows has few values. Omitting that rounding gives the loss in float32, and no other operation
changes its precision.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jaxtyping import Array, PyTree

logger = logging.getLogger("hiso_jax")
# Elementwise arithmetic that may follow the rounding of sums.
ARITHMETIC = {
    *("add", "sub", "mul", "div", "neg", "max", "min", "sqrt", "log", "log1p", "exp", "expm1", "integer_pow", "square"),
    *("abs", "pow", "select_n", "clamp", "logistic", "tanh"),
}
# Operations that only rearrange values.
SHAPES = {"squeeze", "reshape", "broadcast_in_dim", "expand_dims", "copy", "stop_gradient"}
WIDE = (jnp.float32, jnp.float64)
CALLS = ("jit", "pjit")


def is_half(dtype: Any) -> bool:
    """Whether ``dtype`` is a floating-point dtype of fewer than 32 bits."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def in_float32(loss: Callable[..., Array]) -> Callable[..., Array]:
    """``loss`` without the last rounding of a half-precision result; a warning if the rounding cannot be omitted.

    Args:
      loss: a function of any arguments, with a result of any shape.
    """

    def run(*arguments: Any) -> Array:
        value = loss(*arguments)
        if not is_half(getattr(value, "dtype", jnp.float32)):
            return value
        found = _unrounded(loss, arguments)
        if found is None:
            _warn(str(value.dtype), float(jnp.finfo(value.dtype).eps))
            return value
        return found

    return run


def unmoved_share(params: PyTree[Array], mu: float) -> float:
    """The share of the parameters that are in half precision and so large that adding μ does not change them.

    Args:
      params: arrays of JAX or NumPy.
      mu: the smoothing radius μ.
    """
    leaves = jax.tree.leaves(params)
    total = sum(leaf.size for leaf in leaves)

    @jax.jit
    def unmoved(x: Array) -> Array:
        return ((x.astype(jnp.float32) + mu).astype(x.dtype) == x).sum()

    return sum(float(unmoved(leaf)) for leaf in leaves if is_half(leaf.dtype)) / max(total, 1)


@cache
def warn_of_parameters(dtype: str, mu: float, eps: float) -> None:
    """Warn once above which size half-precision parameters do not change along a direction."""
    if jax.process_index() == 0:
        logger.warning(
            "parameters are kept in %s, in which mu = %g does not move those above %.2g: keep them in float32, where "
            "the model may still compute in %s, or take a larger mu",
            dtype,
            mu,
            2 * mu / eps,
            dtype,
        )


@cache
def _warn(dtype: str, eps: float) -> None:
    if jax.process_index() == 0:
        logger.warning(
            "the loss is computed in %s, in which numbers near 1 are %.2g apart: a step of mu changes it by less. Make "
            "its last sum or mean of numbers in float32: losses.astype(jnp.float32).mean()",
            dtype,
            eps,
        )


def _unrounded(loss: Callable[..., Array], arguments: Sequence[Any]) -> Array | None:
    """The loss before its last rounding; None if it is not made of wider values."""
    leaves, structure = jax.tree.flatten(arguments)
    # Arguments that are not arrays stay unchanged, for example a string or a bool that the loss branches on.
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray | np.generic)]

    def of_arrays(*arrays: Array) -> Array:
        own = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            own[place] = array
        return loss(*jax.tree.unflatten(structure, own))

    given = [leaves[place] for place in places]
    program = jax.make_jaxpr(of_arrays)(*given)
    return _end_of(program, given, 0) if program.jaxpr.outvars[0] in _wide_of(program) else None


def _wide_of(program: ClosedJaxpr) -> dict[Any, Any]:
    """The variables of a program that are rounded wider values, or arithmetic of these, each with its equation."""
    wide: dict[Any, Any] = {}
    for equation in program.jaxpr.eqns:
        name = equation.primitive.name
        if name == "convert_element_type":
            is_wide = equation.invars[0].aval.dtype in WIDE and is_half(equation.outvars[0].aval.dtype)
            is_wide |= is_half(equation.outvars[0].aval.dtype) and _is_in(equation.invars[0], wide)
            wide |= {equation.outvars[0]: equation} if is_wide else {}
        elif name in CALLS:
            inner = equation.params["jaxpr"]
            found = _wide_of(inner)
            wide |= {
                outer: equation
                for outer, own in zip(equation.outvars, inner.jaxpr.outvars, strict=True)
                if _is_in(own, found)
            }
        elif name in SHAPES or (name in ARITHMETIC and _is_entry_by_entry(equation)):
            wide |= {equation.outvars[0]: equation} if any(_is_in(own, wide) for own in equation.invars) else {}
    return wide


def _is_in(node: Any, known: Mapping[Any, Any]) -> bool:
    return not isinstance(node, Literal) and node in known


def _is_entry_by_entry(equation: Any) -> bool:
    return {own.aval.shape for own in equation.invars} <= {(), equation.outvars[0].aval.shape}


def _end_of(program: ClosedJaxpr, arguments: Sequence[Any], place: int) -> Array:
    """A result of a program, with all arithmetic after the last rounding in float32."""
    wide, last = _wide_of(program), program.jaxpr.outvars[place]
    # Walk backwards from the result, without recursion: a loss may be a long sum.
    reached: set[Any] = set()
    given: dict[Any, None] = {}
    left = [last]
    while left:
        node = left.pop()
        if isinstance(node, Literal) or node in reached:
            continue
        reached.add(node)
        equation = wide.get(node)
        if equation is None:
            given[node] = None
        elif equation.primitive.name in CALLS or (not _is_in(equation.invars[0], wide) and _is_rounding(equation)):
            given |= {own: None for own in equation.invars if not isinstance(own, Literal)}
        else:
            left += equation.invars
    before = ClosedJaxpr(program.jaxpr.replace(outvars=list(given)), program.consts)
    raw = dict(zip(given, jaxpr_as_fun(before)(*arguments), strict=True))
    made: dict[Any, Any] = {}

    def value_of(node: Any) -> Any:
        value = node.val if isinstance(node, Literal) else made[node] if node in made else raw[node]
        return jnp.asarray(value, jnp.float32) if is_half(jnp.result_type(value)) else value

    for equation in program.jaxpr.eqns:
        for own in equation.outvars:
            if own not in reached or own not in wide:
                continue
            if equation.primitive.name in CALLS:
                inputs = [each.val if isinstance(each, Literal) else raw[each] for each in equation.invars]
                made[own] = _end_of(equation.params["jaxpr"], inputs, equation.outvars.index(own))
            elif _is_rounding(equation):
                made[own] = value_of(equation.invars[0])
            else:
                made[own] = _apply(equation, [value_of(each) for each in equation.invars])
    return made[last]


def _is_rounding(equation: Any) -> bool:
    return equation.primitive.name == "convert_element_type"


def _apply(equation: Any, values: list[Any]) -> Array:
    """The result of an equation on wider values, cast to one dtype."""
    floats = [value for value in values if jnp.issubdtype(jnp.result_type(value), jnp.floating)]
    dtype = jnp.result_type(*(jnp.asarray(value).dtype for value in floats))
    same = [
        jnp.asarray(value, dtype) if jnp.issubdtype(jnp.result_type(value), jnp.floating) else value for value in values
    ]
    return equation.primitive.bind(*same, **equation.params)
