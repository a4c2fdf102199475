"""Fine-tuning with forward passes only, on one device and without a federation (MeZO, arXiv 2305.17333)."""

from collections.abc import Callable
from typing import Any

import optax
from jaxtyping import Array, Float, PyTree

from hiso_jax.zo.scalars import Method, check_estimator, scalars
from hiso_jax.zo.transforms import zo_state

Step = Callable[[PyTree, optax.OptState, PyTree, Any], tuple[PyTree, optax.OptState, Float[Array, ""]]]


def step(
    loss_fn: Callable[[Any, Any], Array],
    tx: optax.GradientTransformation,
    *,
    num_perturbations: int = 5,
    mu: float = 1e-3,
    method: Method = "forward",
) -> Step:
    """A jit-able training step: ``(params, state, batch, round_key) → (params, state, loss)``.

    The directions of the scalars are read from the optimizer's state, so they cannot disagree with the update.

    Args:
      loss_fn: ``(params, batch) → scalar``.
      tx: an optax transformation headed by ``scale_by_hiso`` or ``scale_by_zo``.
      num_perturbations: P ≥ 1.
      mu: the smoothing radius μ > 0.
      method: ``"forward"`` (P + 1 evaluations) or ``"central"`` (2·P).

    Raises:
      ValueError: P, μ or the method out of range; at the call, a state without such a head.

    Example:
      Fold the step number into the key: a constant key repeats its directions.

      >>> import hiso_jax, jax, jax.numpy as jnp
      >>> from hiso_jax import zo
      >>> tx = hiso_jax.hiso(learning_rate=0.1)
      >>> train_step = jax.jit(zo.step(lambda x, b: jnp.sum((x - b) ** 2), tx))
      >>> params, key = jnp.ones(3), jax.random.key(0)
      >>> state = tx.init(params)
      >>> for i in range(3):
      ...     params, state, loss = train_step(params, state, jnp.zeros(3), jax.random.fold_in(key, i))
    """
    check_estimator(num_perturbations, mu, method)
    tx = optax.with_extra_args_support(tx)

    def run(
        params: PyTree, state: optax.OptState, batch: PyTree, round_key: Any
    ) -> tuple[PyTree, optax.OptState, Float[Array, ""]]:
        head = zo_state(state)
        loss, values = scalars(
            loss_fn,
            params,
            batch,
            round_key,
            curvature=head.curvature,
            num_perturbations=num_perturbations,
            mu=mu,
            method=method,
            sampler=head.directions.sampler,
        )
        updates, state = tx.update(values[None], state, params, key=round_key)
        return optax.apply_updates(params, updates), state, loss

    return run
