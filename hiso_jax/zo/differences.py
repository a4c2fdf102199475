"""Scalars from losses: finite differences along shared directions (HiSo, Algorithm 1)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Key, PyTree, Shaped

from hiso_jax.checks import ParameterError, integer, positive
from hiso_jax.factored import PerturbedAs
from hiso_jax.renamed import with_known_names
from hiso_jax.zo.directions import Directions, as_directions, perturb
from hiso_jax.zo.hadamard import grouped_directions
from hiso_jax.zo.precision import in_float32
from hiso_jax.zo.samplers import Sampler

DifferenceName = Literal["forward", "central", "second"]
Carry = TypeVar("Carry")


@with_known_names
@dataclass(frozen=True)
class Difference:
    """A finite difference: the multiples of μ at which the loss is evaluated, and the estimates made of the losses.

    Attributes:
      offsets: the multiples of μ. The loss at offset 0 is evaluated once a local step, for all its directions.
      estimates: (losses [...] in the order of the offsets, μ) → the derivative estimates of a direction, a pytree of
        [...] arrays.
    """

    offsets: tuple[float, ...]
    estimates: Callable[[Sequence[Array], ArrayLike], PyTree[Shaped[Array, "..."]]]

    @property
    def has_one_estimate(self) -> bool:
        """Whether a direction has one estimate, its slope, and not a tree of several."""
        losses = [jax.ShapeDtypeStruct((), jnp.float32)] * len(self.offsets)
        return isinstance(jax.eval_shape(lambda own: self.estimates(own, 1.0), losses), jax.ShapeDtypeStruct)

    def passes(self, num_perturbations: int) -> int:
        """The number of loss evaluations in a local step of ``num_perturbations`` directions."""
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
"""[f(x + μz) − f(x)] / μ: P + 1 loss evaluations."""
central = Difference((1.0, -1.0), _central)
"""[f(x + μz) − f(x − μz)] / (2μ): 2·P loss evaluations."""
second = Difference((0.0, 1.0, -1.0), _second)
"""The central difference and [f(x + μz) + f(x − μz) − 2f(x)] / μ² (HiZOO, arXiv 2402.15173): 2·P + 1 loss
evaluations."""

DIFFERENCES: dict[str, Difference] = {"forward": forward, "central": central, "second": second}


def as_difference(difference: Difference | str) -> Difference:
    """A difference, given as a value or by name.

    Raises:
      ValueError: the name is unknown.
    """
    if isinstance(difference, Difference):
        return difference
    if difference not in DIFFERENCES:
        names = ", ".join(DIFFERENCES)
        raise ParameterError("difference", f"must be one of {names}, or a Difference; got {difference!r}")
    return DIFFERENCES[difference]


def directional_derivatives(numbers: PyTree) -> Any:
    """The estimates that Δ is made from: the entry "slope" if a difference gives several estimates, else all."""
    return numbers["slope"] if isinstance(numbers, Mapping) and "slope" in numbers else numbers


def check_estimator(num_perturbations: int, mu: ArrayLike) -> None:
    """Refuse an invalid P or μ.

    Raises:
      ValueError: ``num_perturbations`` < 1, or ``mu`` is not positive and finite.
    """
    integer("num_perturbations", num_perturbations, 1)
    positive("mu", mu)


def suggested_mu(loss: float, dtype: DTypeLike, dimension: int) -> float:
    """A smoothing radius with equal rounding and curvature errors of a scalar, to one significant digit.

    A difference of losses has a rounding error of about eps·log₂(d)·abs(f), which the scalar divides by μ. Curvature
    adds an error of μ·uᵀ∇²f u / 2, whose mean over directions is μ·tr(∇²f) / 2. The two errors are equal at
    μ = √(2·eps·log₂(d)·abs(f) / tr ∇²f). The trace is not measured and is taken to be 1; then d enters only through its
    logarithm.

    Args:
      loss: f at the start of the run.
      dtype: the dtype in which losses are computed.
      dimension: d, the number of trained parameters.
    """
    mu = math.sqrt(2 * float(jnp.finfo(dtype).eps) * math.log2(max(dimension, 2)) * max(abs(loss), 1e-3))
    return float(f"{mu:.0e}")


def scalar_loss(loss_fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Array]:
    """``loss_fn``, in float32 if possible; a call refuses a result that is not a single number."""
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
        value = jnp.asarray(loss)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ParameterError("loss_fn", f"must return a floating-point number, got {value.dtype}")
        return value

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

    Each direction is made once and passed to ``evaluate`` (which may evaluate many clients) and then, with the
    resulting estimates, to ``fold``. Single clients, single-device training and cohorts all measure with this loop.

    Args:
      evaluate: (direction or None, scale) → losses [...] at the parameters perturbed by scale · direction.
      direction_at: perturbation index → direction.
      difference: the scales, and the estimates made of the losses.
      num_perturbations: P.
      mu: the smoothing radius μ.
      fold: (carry, direction, estimates [...]) → (carry, output), called once for each perturbation; by default the
        output is the estimates.
      init: the initial carry.

    Returns:
      The last carry, the unperturbed losses [...] (the mean of all evaluated losses if these are not evaluated), the
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


@with_known_names
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
    """The P scalars of one local step, which a client sends in place of a gradient (HiSo, Algorithm 1).

    g_p = [f(x + μ z_p) − f(x)] / μ (forward) or [f(x + μ z_p) − f(x − μ z_p)] / (2μ) (central), all on the same
    batch, with z_p = H^{-1/2} ⊙ u_p made from ``perturbation_key(round_key, step, p)``.

    Args:
      loss_fn: ``(params, batch) → scalar``.
      params: the trainable parameters, any pytree of floating-point arrays.
      batch: the second argument of ``loss_fn``.
      round_key: the key of the round.
      step: local step k.
      curvature: H, in the structure of ``params``; None means H = 1.
      num_perturbations: P ≥ 1.
      mu: the smoothing radius μ > 0.
      difference: ``"forward"``, ``"central"``, or another :class:`Difference`; ``"second"`` gives two estimates a
        direction, {"slope": [P], "curvature": [P]}.
      sampler: the family of raw perturbations, as a function or by name, or :class:`~hiso_jax.zo.Directions`; None
        means gaussian.
      perturbed_as: which parameters the model reads as a weight plus a direction of low rank, see
        :func:`~hiso_jax.zo.perturb`; None makes every perturbed parameter dense.

    Returns:
      (loss, scalars [P]), in float32 or wider. The central loss is the mean over the pairs.

    Raises:
      ValueError: P, μ or the difference is out of range, or the loss is not a single number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from hiso_jax import zo
      >>> loss, g = zo.scalars(lambda x, b: jnp.sum((x - b) ** 2), jnp.ones(3), jnp.zeros(3),
      ...                      jax.random.key(0), num_perturbations=2, mu=1e-3)
      >>> g.shape
      (2,)
    """
    directions, loss_of = as_directions(sampler), scalar_loss(loss_fn)
    made = grouped_directions(directions, round_key, step, params, curvature, 1, num_perturbations)
    _, loss, values = probe(
        lambda z, scale: loss_of(params if z is None else perturb(params, z, scale, perturbed_as), batch),
        lambda index: made.at(index).of(0),
        as_difference(difference),
        num_perturbations=num_perturbations,
        mu=mu,
    )
    return loss, values
