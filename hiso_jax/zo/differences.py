"""Losses → scalars: finite differences along shared directions (HiSo, Algorithm 1)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Literal, TypeVar

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Key, PyTree, Shaped

from hiso_jax.checks import ParameterError, integer, positive
from hiso_jax.factored import PerturbedAs
from hiso_jax.renamed import with_renamed
from hiso_jax.zo.directions import Directions, as_directions, perturb
from hiso_jax.zo.precision import in_float32
from hiso_jax.zo.samplers import Sampler

DifferenceName = Literal["forward", "central", "second"]
Carry = TypeVar("Carry")


@dataclass(frozen=True)
class Difference:
    """At which multiples of μ along a direction a loss is evaluated, and which numbers are made of it.

    Attributes:
      offsets: in units of μ. A loss at offset 0 is evaluated once a local step, for all its directions.
      estimates: (losses [...] at the offsets in their order, μ) → the derivative estimates of a direction, a pytree of
        [...] arrays.
    """

    offsets: tuple[float, ...]
    estimates: Callable[[Sequence[Array], ArrayLike], PyTree[Shaped[Array, "..."]]]

    def passes(self, num_perturbations: int) -> int:
        """How often the loss is evaluated in a local step of ``num_perturbations`` directions."""
        return (0 in self.offsets) + num_perturbations * sum(offset != 0 for offset in self.offsets)


def _forward(losses: Sequence[Array], mu: ArrayLike) -> Array:
    base, plus = losses
    return (plus - base) / mu


def _central(losses: Sequence[Array], mu: ArrayLike) -> Array:
    plus, minus = losses
    return (plus - minus) / (2 * mu)


def _second(losses: Sequence[Array], mu: ArrayLike) -> dict[str, Array]:
    base, plus, minus = losses
    return {"slope": (plus - minus) / (2 * mu), "curvature": (plus + minus - 2 * base) / mu**2}


forward = Difference((0.0, 1.0), _forward)
"""[f(x + μz) − f(x)] / μ: P + 1 evaluations."""
central = Difference((1.0, -1.0), _central)
"""[f(x + μz) − f(x − μz)] / (2μ): 2·P evaluations."""
second = Difference((0.0, 1.0, -1.0), _second)
"""The central slope and [f(x + μz) + f(x − μz) − 2f(x)] / μ² (HiZOO, arXiv 2402.15173): 2·P + 1 evaluations."""

DIFFERENCES: dict[str, Difference] = {"forward": forward, "central": central, "second": second}


def as_difference(difference: Difference | str) -> Difference:
    """A difference, given itself or by name.

    Raises:
      ValueError: an unknown name.
    """
    if isinstance(difference, Difference):
        return difference
    if difference not in DIFFERENCES:
        names = ", ".join(DIFFERENCES)
        raise ParameterError("difference", f"must be one of {names}, or a Difference; got {difference!r}")
    return DIFFERENCES[difference]


def directional_derivatives(numbers: PyTree) -> Any:
    """The numbers of which Δ is made: all there are, or those named "slope" where a difference gives several."""
    return numbers["slope"] if isinstance(numbers, Mapping) and "slope" in numbers else numbers


def check_estimator(num_perturbations: int, mu: ArrayLike) -> None:
    """Refuse an estimator that cannot exist.

    Raises:
      ValueError: ``num_perturbations`` < 1, or ``mu`` not positive and finite.
    """
    integer("num_perturbations", num_perturbations, 1)
    positive("mu", mu)


def suggested_mu(loss: float, dtype: DTypeLike, dimension: int) -> float:
    """A smoothing radius at which rounding and curvature spoil a scalar alike, to one significant digit.

    A difference of losses rounds to about eps·log₂(d)·|f|, so that a scalar is off by that over μ; for the curvature
    it is off by μ·uᵀ∇²f u / 2, whose mean over directions is μ·tr(∇²f) / 2. They are equal at
    μ = √(2·eps·log₂(d)·|f| / tr ∇²f). The trace is taken to be 1, for want of a measurement; then d enters by its
    logarithm alone.

    Args:
      loss: f, where the run begins.
      dtype: in which losses are computed.
      dimension: d, the number of trained parameters.
    """
    mu = math.sqrt(2 * float(jnp.finfo(dtype).eps) * math.log2(max(dimension, 2)) * max(abs(loss), 1e-3))
    return float(f"{mu:.0e}")


def scalar_loss(loss_fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Array]:
    """``loss_fn``, in float32 where it can be had so; what is not one number is refused where it is called."""
    precise = in_float32(loss_fn)

    def checked(params: Any, batch: Any) -> Array:
        loss = precise(params, batch)
        if isinstance(loss, tuple):
            raise ParameterError(
                "loss_fn", "must return the loss alone, got a tuple: there is no has_aux without a gradient"
            )
        if jnp.shape(loss) != ():
            raise ParameterError(
                "loss_fn",
                f"must return one number, got an array of shape {jnp.shape(loss)}: take the mean over the batch",
            )
        return jnp.asarray(loss)

    return checked


def probe(
    evaluate: Callable[[Any, Any], Array],
    direction_at: Callable[[Array], Any],
    difference: Difference,
    *,
    num_perturbations: int,
    mu: ArrayLike,
    fold: Callable[[Carry, Any, PyTree], tuple[Carry, Any]] = lambda carry, z, numbers: (carry, numbers),
    init: Carry = None,  # type: ignore[assignment]
) -> tuple[Carry, Float[Array, "..."], Any]:
    """Evaluate losses along P directions, one at a time, so that memory does not grow with P.

    Each direction is made once and handed to ``evaluate`` (which may evaluate many clients) and then, with the
    numbers it gave, to ``fold``. Who measures alone, trains alone or measures for a cohort does it by this loop.

    Args:
      evaluate: (direction or None, scale) → losses [...] at the parameters moved by scale · direction.
      direction_at: perturbation index → direction.
      difference: at which scales, and what is made of the losses.
      num_perturbations: P.
      mu: the smoothing radius μ.
      fold: (carry, direction, numbers [...]) → (carry, output), run once a perturbation; its output is the numbers
        unless said otherwise.
      init: the first carry.

    Returns:
      The last carry, the unperturbed losses [...] (if they are not evaluated: the mean over all that are), the
      outputs [P, ...].
    """
    check_estimator(num_perturbations, mu)

    def loss(z: Any, scale: Any) -> Array:
        value = evaluate(z, scale)
        return value.astype(jnp.promote_types(value.dtype, jnp.float32))

    base = [loss(None, 0.0)] if 0 in difference.offsets else []

    def body(carry: Carry, index: Array) -> tuple[Carry, tuple[Any, Array]]:
        z = direction_at(index)
        losses = [base[0] if offset == 0 else loss(z, offset * mu) for offset in difference.offsets]
        carry, output = fold(carry, z, difference.estimates(losses, mu))
        return carry, (output, base[0] if base else reduce(add, losses) / len(losses))

    carry, (outputs, middles) = lax.scan(body, init, jnp.arange(num_perturbations))
    return carry, base[0] if base else middles.mean(0), outputs


@with_renamed
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
    difference: Difference | DifferenceName = "forward",
    sampler: Directions | Sampler | str | None = None,
    perturbed_as: PerturbedAs | None = None,
) -> tuple[Float[Array, ""], PyTree[Float[Array, "P"]]]:
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
      difference: ``"forward"``, ``"central"``, or another :class:`Difference`; ``"second"`` gives two estimates a
        direction, {"slope": [P], "curvature": [P]}.
      sampler: the family of raw perturbations, itself or by name, or :class:`~hiso_jax.zo.Directions`; None means
        gaussian.
      perturbed_as: which parameters the model reads as a weight with a direction of low rank beside it, see
        :func:`~hiso_jax.zo.perturb`; None makes every moved parameter whole.

    Returns:
      (loss, scalars [P]), in float32 or wider. The central loss is the mean over the pairs.

    Raises:
      ValueError: P, μ or the difference out of range, or a loss that is not one number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from hiso_jax import zo
      >>> loss, g = zo.scalars(lambda x, b: jnp.sum((x - b) ** 2), jnp.ones(3), jnp.zeros(3),
      ...                      jax.random.key(0), num_perturbations=2, mu=1e-3)
      >>> g.shape
      (2,)
    """
    directions, loss_of = as_directions(sampler), scalar_loss(loss_fn)
    _, loss, values = probe(
        lambda z, scale: loss_of(params if z is None else perturb(params, z, scale, perturbed_as), batch),
        lambda index: directions.at(round_key, step, index, params, curvature),
        as_difference(difference),
        num_perturbations=num_perturbations,
        mu=mu,
    )
    return loss, values
