"""Losses → scalars: forward and central differences along shared directions (HiSo, Algorithm 1)."""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree, Shaped

from hiso_jax.zo.directions import Sampler, direction, perturb, perturbation_key

Method = Literal["forward", "central"]
Carry = TypeVar("Carry")


def check_estimator(num_perturbations: int, mu: ArrayLike, method: str) -> None:
    """Refuse an estimator that cannot exist.

    Raises:
      ValueError: ``num_perturbations`` < 1, ``mu`` not positive and finite, or an unknown ``method``.
    """
    if num_perturbations < 1:
        raise ValueError(f"num_perturbations must be at least 1, got {num_perturbations}")
    if isinstance(mu, int | float) and not (math.isfinite(mu) and mu > 0):
        raise ValueError(f"mu must be a positive finite number, got {mu}")
    if method not in ("forward", "central"):
        raise ValueError(f"method must be 'forward' or 'central', got {method!r}")


def scan_perturbations(
    evaluate: Callable[[Any, Any], Array],
    direction_at: Callable[[Array], Any],
    *,
    num_perturbations: int,
    mu: float,
    method: Method,
    fold: Callable[[Carry, Any, Array], tuple[Carry, Any]] = lambda carry, z, scalars: (carry, scalars),
    init: Carry = None,  # type: ignore[assignment]
) -> tuple[Carry, Float[Array, "..."], Any]:
    """Evaluate losses along P directions, one at a time, so that memory does not grow with P.

    Each direction is made once and handed to ``evaluate`` (which may evaluate many clients) and then, with the
    scalars it gave, to ``fold``.

    Args:
      evaluate: (direction or None, scale) → losses [...] at the parameters moved by scale · direction.
      direction_at: perturbation index → direction.
      num_perturbations: P.
      mu: the smoothing radius μ.
      method: ``"forward"`` (one base evaluation and P more) or ``"central"`` (2·P evaluations).
      fold: (carry, direction, scalars [...]) → (carry, output), run once a perturbation; its output is the scalars
        unless said otherwise.
      init: the first carry.

    Returns:
      The last carry, the unperturbed losses [...] (central: the mean over the pairs), the outputs [P, ...].
    """
    check_estimator(num_perturbations, mu, method)

    def loss(z: Any, scale: Any) -> Array:
        value = evaluate(z, scale)
        return value.astype(jnp.promote_types(value.dtype, jnp.float32))

    base = loss(None, 0.0) if method == "forward" else None

    def body(carry: Carry, index: Array) -> tuple[Carry, tuple[Array, Array]]:
        z = direction_at(index)
        plus = loss(z, mu)
        if base is not None:
            scalars, middle = (plus - base) / mu, base
        else:
            minus = loss(z, -mu)
            scalars, middle = (plus - minus) / (2 * mu), (plus + minus) / 2
        carry, output = fold(carry, z, scalars)
        return carry, (output, middle)

    carry, (outputs, middles) = lax.scan(body, init, jnp.arange(num_perturbations))
    return carry, middles.mean(0) if base is None else base, outputs


def scalars(
    loss_fn: Callable[[Any, Any], Array],
    params: PyTree[Shaped[Array, "..."]],
    batch: PyTree,
    round_key: Key[Array, ""],
    *,
    step: int | Array = 0,
    curvature: PyTree[Shaped[Array, "..."]] | None = None,
    num_perturbations: int,
    mu: float,
    method: Method = "forward",
    sampler: Sampler | None = None,
) -> tuple[Float[Array, ""], Float[Array, "P"]]:
    """The P scalars of one local step: what a client sends in place of a gradient (HiSo, Algorithm 1).

    g_p = [f(x + μ z_p) − f(x)] / μ (forward) or [f(x + μ z_p) − f(x − μ z_p)] / (2μ) (central), all on the same
    batch, with z_p = H^{-1/2} ⊙ u_p made from ``perturbation_key(round_key, step, p)``.

    Args:
      loss_fn: ``(params, batch) → scalar``.
      params: the trainable parameters, any pytree of floating-point arrays.
      batch: whatever ``loss_fn`` takes.
      round_key: the key of the round.
      step: local step k.
      curvature: H, in the structure of ``params``; None means H = 1.
      num_perturbations: P ≥ 1.
      mu: the smoothing radius μ > 0.
      method: ``"forward"`` or ``"central"``.
      sampler: the family of raw perturbations; None means gaussian.

    Returns:
      (loss, scalars [P]), in float32 or wider. The central loss is the mean over the pairs.

    Raises:
      ValueError: P, μ or the method out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from hiso_jax import zo
      >>> loss, g = zo.scalars(lambda x, b: jnp.sum((x - b) ** 2), jnp.ones(3), jnp.zeros(3),
      ...                      jax.random.key(0), num_perturbations=2, mu=1e-3)
      >>> g.shape
      (2,)
    """
    _, loss, values = scan_perturbations(
        lambda z, scale: loss_fn(params if z is None else perturb(params, z, scale), batch),
        lambda p: direction(perturbation_key(round_key, step, p), params, curvature, sampler),
        num_perturbations=num_perturbations,
        mu=mu,
        method=method,
    )
    return loss, values
