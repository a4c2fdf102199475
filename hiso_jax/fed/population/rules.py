"""Rules that users write as functions: checked once, before a program contains them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hiso_jax.checks import ParameterError, first_line, shown


def check_rule(name: str, signature: str, rule: Any, call: Callable[[Any], Any], shape: tuple[int], kind: Any) -> None:
    """Refuse a rule that JAX cannot compile, or that returns another array than it should.

    Args:
      name: the parameter.
      signature: the arguments and the result of the rule, for the error.
      rule: the rule.
      call: rule → its result, for arguments like those of a run; it is traced and not computed.
      shape: the shape of the result.
      kind: the kind of its dtype, ``jnp.bool_`` or ``jnp.integer``.

    Raises:
      ParameterError: it is no such function.
    """
    if not callable(rule) or isinstance(rule, type):
        raise ParameterError(name, f"must be a {signature}; got {shown(rule)}")
    try:
        made = jax.eval_shape(lambda: call(rule))
    except Exception as error:
        raise ParameterError(
            name, f"must be a {signature}, which JAX can compile; it fails with: {first_line(error)}"
        ) from error
    if getattr(made, "shape", None) != shape or not jnp.issubdtype(made.dtype, kind):
        got = f"{made.dtype} of shape {made.shape}" if hasattr(made, "dtype") else f"a {type(made).__name__}"
        raise ParameterError(name, f"must be a {signature}; for {shape[0]} clients it returns {got}")
