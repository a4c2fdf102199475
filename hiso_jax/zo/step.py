"""Fine-tuning with forward passes only, on one device and without a federation (MeZO, arXiv 2305.17333)."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from hiso_jax.checks import ParameterError, arrays, function, is_real, shown, transformation
from hiso_jax.factored import PerturbedAs
from hiso_jax.renamed import with_known_names
from hiso_jax.zo.accumulate import Ascent
from hiso_jax.zo.chain import check_chain, settled, update_with
from hiso_jax.zo.delta_sum import Total
from hiso_jax.zo.differences import (
    Difference,
    DifferenceName,
    as_difference,
    check_estimator,
    directional_derivatives,
    probe,
    scalar_loss,
)
from hiso_jax.zo.directions import perturb
from hiso_jax.zo.groups import Direction, GroupedDirections
from hiso_jax.zo.hadamard import check_regenerated
from hiso_jax.zo.precision import is_half, warn_of_parameters
from hiso_jax.zo.rounding import apply_updates, like_before
from hiso_jax.zo.state import zo_state, zo_states

DirectionsMode = Literal["keep", "regenerate"]

Step = Callable[[PyTree, optax.OptState, PyTree, Any], tuple[PyTree, optax.OptState, Float[Array, ""]]]


@with_known_names
def step(
    loss_fn: Callable[[Any, Any], Array],
    tx: optax.GradientTransformation,
    *,
    num_perturbations: int = 5,
    mu: float = 1e-3,
    difference: Difference | DifferenceName = "forward",
    directions: DirectionsMode = "regenerate",
    perturbed_as: PerturbedAs | None = None,
) -> Step:
    """A jit-able training step: ``(params, state, batch, round_key) → (params, state, loss)``.

    The optimizer's state defines the directions of the scalars, so they cannot disagree with the update. A loss in half
    precision is taken in float32 before its last rounding, which would lose differences of μ. If that is impossible, or
    if parameters are in half precision, a warning describes the lost precision. Members of the chain that read the loss
    (``value=``, as ``optax.contrib.reduce_on_plateau``) receive it.

    Args:
      loss_fn: ``(params, batch) → scalar``.
      tx: an optax transformation headed by ``scale_by_hiso`` or ``scale_by_zo``.
      num_perturbations: P ≥ 1.
      mu: the smoothing radius μ > 0.
      difference: ``"forward"`` (P + 1 loss evaluations), ``"central"`` (2·P), or another
        :class:`~hiso_jax.zo.Difference` that the optimizer's head reads.
      directions: ``"regenerate"`` makes each direction twice, for its scalar and for the update, and needs one copy
        of the parameters; ``"keep"`` makes it once and needs two copies. Both give the same bits.
      perturbed_as: which parameters the model reads as a weight plus a direction of low rank, see
        :func:`~hiso_jax.zo.perturb`; None makes every perturbed parameter dense.

    Raises:
      ValueError: P, μ, the difference or ``directions`` is out of range; at the call, the loss is not a single number,
        the state has no such head, or a member before the head needs the parameters.

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
    function("loss_fn", loss_fn, "params, batch")
    transformation("tx", tx)
    if perturbed_as is not None:
        function("perturbed_as", perturbed_as, "name")
    check_estimator(num_perturbations, mu)
    chosen = as_difference(difference)
    check_directions(directions)
    loss_of = scalar_loss(loss_fn)
    mode, keep = directions, directions == "keep"
    tx = optax.with_extra_args_support(tx)

    def run(
        params: PyTree, state: optax.OptState, batch: PyTree, round_key: Any
    ) -> tuple[PyTree, optax.OptState, Float[Array, ""]]:
        _check_call(params, state, round_key)
        for dtype in {leaf.dtype for leaf in jax.tree.leaves(params)}:
            if is_half(dtype) and is_real(mu):
                warn_of_parameters(str(dtype), float(mu), float(jnp.finfo(dtype).eps))
        state = settled(tx, state, params)
        # Training on one device is a cohort of one client.
        head = zo_state(state)
        check_regenerated(head.directions, mode)
        directions = head.grouped_directions(
            round_key, 0, params, groups=head.directions.groups_of(1), num_perturbations=num_perturbations
        )

        def fold(total: Total, direction: Direction, numbers: PyTree) -> tuple[Total, tuple[PyTree, list]]:
            grown = (
                direction.add_to(total, directional_derivatives(numbers)[None], num_perturbations)
                if keep
                else (total, [])
            )
            return grown[0], (numbers, grown[1])

        total, loss, (numbers, terms) = probe(
            lambda z, scale: loss_of(params if z is None else perturb(params, z.of(0), scale, perturbed_as), batch),
            directions.at,
            chosen,
            num_perturbations=num_perturbations,
            mu=mu,
            fold=fold,
            init=directions.begin() if isinstance(directions, GroupedDirections) and keep else [],
        )
        aggregate = jax.tree.map(lambda x: x[None], numbers)
        check_chain(tx, params, aggregate)
        ascent = None
        if isinstance(directions, GroupedDirections) and keep:
            ascent = Ascent(aggregate, directions.finish(total, terms))
        updates, after = update_with(tx, aggregate, state, params, value=loss, key=round_key, ascent=ascent, clients=1)
        return apply_updates(params, updates, round_key), like_before(after, state), loss

    return run


def _check_call(params: PyTree, state: Any, round_key: Any) -> None:
    """Refuse arguments in another order, and a number in the place of a key.

    Raises:
      ParameterError: an argument is not what it should be.
    """
    arrays("params", params)
    if len(zo_states(state)) != 1:
        raise ParameterError(
            "state",
            "must be tx.init(params) of an optimizer with exactly one of scale_by_hiso or scale_by_zo, at its head; "
            "the arguments are params, state, batch, round_key",
        )
    typed = hasattr(round_key, "dtype") and jax.dtypes.issubdtype(round_key.dtype, jax.dtypes.prng_key)
    if round_key.ndim != 0 if typed else getattr(round_key, "shape", None) != (2,):
        raise ParameterError("round_key", f"must be one key, jax.random.key(seed) say; got {shown(round_key)}")


def check_directions(directions: str) -> None:
    """Refuse an unknown mode.

    Raises:
      ValueError: ``directions`` is neither ``"keep"`` nor ``"regenerate"``.
    """
    if directions not in ("keep", "regenerate"):
        raise ParameterError("directions", f"must be keep or regenerate, got {directions}")
