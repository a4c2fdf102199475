"""A loss in half precision taken in float32, before its last rounding.

A scalar is a difference of two losses that differ by about μ. In bfloat16 neighbouring numbers near 1 are 0.008 apart,
so that the difference is nothing but rounding. JAX's reductions add numbers of half precision in float32 and round the
sum, and what is computed of sums afterwards is a few numbers. So the loss is had in float32 by taking that rounding
off; nothing else is computed in another precision.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jaxtyping import Array, PyTree

logger = logging.getLogger("hiso_jax")
# What may be done to sums after they were rounded, entry by entry.
ARITHMETIC = {"add", "sub", "mul", "div", "neg", "max", "min", "sqrt", "log", "exp", "integer_pow", "square", "abs"}
CALLS = ("jit", "pjit")


def is_half(dtype: Any) -> bool:
    """Whether numbers of ``dtype`` are floats of less than 32 bits."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def in_float32(loss: Callable[..., Array]) -> Callable[..., Array]:
    """``loss``; one in half precision without its last rounding, where it has one, and said to be one where not.

    Args:
      loss: of any arguments; its result is of any shape.
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
    """The share of the parameters that are kept in half precision and are so large that μ does not move them.

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
    """Say once from which size on parameters of half precision do not move along a direction."""
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
    """The loss before it was rounded; None where nothing wider than itself leads to it."""
    program = jax.make_jaxpr(loss)(*arguments)
    return _end_of(program, jax.tree.leaves(arguments), 0) if _is_wide(program, 0) else None


def _makers(program: ClosedJaxpr) -> dict[Any, Any]:
    """The equation that makes each variable of a program."""
    return {own: equation for equation in program.jaxpr.eqns for own in equation.outvars}


def _step(node: Any, makers: dict[Any, Any]) -> tuple[str, Any]:
    """How a number came about, as far as its precision goes, and the equation of it."""
    equation = None if isinstance(node, Literal) else makers.get(node)
    if equation is None:
        return "given", None
    name, shape = equation.primitive.name, node.aval.shape
    if name == "convert_element_type" and equation.invars[0].aval.dtype in (jnp.float32, jnp.float64):
        return "rounded", equation
    if name in ARITHMETIC and all(own.aval.shape == shape for own in equation.invars):
        return "arithmetic", equation
    if name in CALLS and _is_wide(equation.params["jaxpr"], equation.outvars.index(node)):
        return "call", equation
    return "given", None


def _is_wide(program: ClosedJaxpr, place: int) -> bool:
    """Whether a result of a program is a rounded number, or made of such by arithmetic alone."""
    makers = _makers(program)

    def is_wide(node: Any) -> bool:
        how, equation = _step(node, makers)
        return how in ("rounded", "call") or (how == "arithmetic" and any(map(is_wide, equation.invars)))

    return is_wide(program.jaxpr.outvars[place])


def _end_of(program: ClosedJaxpr, arguments: Sequence[Any], place: int) -> Array:
    """A result of a program, its arithmetic behind the last rounding in float32."""
    makers, last = _makers(program), program.jaxpr.outvars[place]
    needed: dict[Any, None] = {}

    def note(node: Any) -> None:
        how, equation = _step(node, makers)
        if how == "arithmetic":
            for own in equation.invars:
                note(own)
            return
        for own in [node] if how == "given" else equation.invars:
            if not isinstance(own, Literal):
                needed[own] = None

    note(last)
    before = ClosedJaxpr(program.jaxpr.replace(outvars=list(needed)), program.consts)
    known = dict(zip(needed, jaxpr_as_fun(before)(*arguments), strict=True))

    def raw(node: Any) -> Any:
        return node.val if isinstance(node, Literal) else known[node]

    def wide(node: Any) -> Any:
        how, equation = _step(node, makers)
        if how == "arithmetic":
            return equation.primitive.bind(*map(wide, equation.invars), **equation.params)
        if how == "call":
            return _end_of(equation.params["jaxpr"], list(map(raw, equation.invars)), equation.outvars.index(node))
        value = raw(equation.invars[0] if how == "rounded" else node)
        return jnp.asarray(value, jnp.float32) if is_half(jnp.result_type(value)) else value

    return wide(last)
