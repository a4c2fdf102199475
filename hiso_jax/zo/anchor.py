"""Anchored weight decay: every update goes back a share of the way to the initial parameters.

x ← x + u − λ (x − x₀). The initial parameters are known to everyone, so it costs no bytes. It is L2-SP (Li, Grandvalet
and Davoine, arXiv 1802.01483), decoupled from the learning rate as decay is in AdamW.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from hiso_jax.checks import ParameterError, between
from hiso_jax.exact import rounded


class AnchorState(NamedTuple):
    """The initial parameters."""

    start: PyTree


def anchored_decay(rate: float) -> optax.GradientTransformation:
    """A transformation that adds −λ (x − x₀) to updates; it follows the learning rate in a chain.

    Args:
      rate: λ, the share of the distance to the initial parameters that each update goes back, 0 ≤ λ ≤ 1.

    Raises:
      ParameterError: ``rate`` is out of range; or it is given no parameters.

    Example:
      >>> import hiso_jax, optax
      >>> tx = optax.chain(hiso_jax.hiso(1e-3), hiso_jax.zo.anchored_decay(0.01))
    """
    between("rate", rate, 0, 1)

    def init(params: PyTree) -> AnchorState:
        return AnchorState(jax.tree.map(jnp.array, params))

    def update(updates: PyTree, state: AnchorState, params: PyTree | None = None) -> tuple[PyTree, AnchorState]:
        if params is None:
            raise ParameterError("params", "must be given to anchored_decay, which measures how far they are")

        def one(update: Any, x: Any, start: Any) -> Any:
            # In the update's dtype, which is float32 or wider; both products are rounded before they are added.
            far = x.astype(update.dtype) - start.astype(update.dtype)
            return rounded(update) - rounded(rate * far)

        return jax.tree.map(one, updates, params, state.start), state

    return optax.GradientTransformation(init, update)
