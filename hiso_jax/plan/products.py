"""Floating-point operations of a function's matrix products and convolutions, from its jaxpr, for every backend."""

import math
from collections.abc import Callable
from typing import Any

import jax

from hiso_jax.fed.devices import inner_jaxprs


def flops_of_function(function: Callable[..., Any], *arguments: Any) -> int:
    """The operations of one call with arguments of these shapes; a conditional counts its most expensive branch."""
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of(jaxpr: Any) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    result: Any = equation.outvars[0].aval if equation.outvars else None
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(result.shape) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = params["dimension_numbers"].rhs_spec[0]
        return 2 * math.prod(result.shape) * math.prod(kernel) // kernel[outputs]
    inner = inner_jaxprs(equation)
    if name == "cond":
        return max(map(_of, inner))
    return sum(map(_of, inner)) * (params["length"] if name == "scan" else 1)
