"""optax transformations over scalars: the general ``head``, the isotropic ``scale_by_zo``, and ``decomfl``.

A head stands at the start of an ``optax.chain`` and takes the [K, P] array of a round's scalars in place of
gradients. Every later member of the chain is a deterministic function of seeds, scalars and shared state, so it costs
no extra byte of communication (HiSo, arXiv 2506.02370, Algorithm 1).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from hiso_jax.checks import ParameterError, arrays, rate
from hiso_jax.exact import pin
from hiso_jax.zo.accumulate import Ascent, Visits, accumulate, groups_in
from hiso_jax.zo.chain import PROBE, SKIP, Reached
from hiso_jax.zo.differences import directional_derivatives
from hiso_jax.zo.directions import Directions, as_directions, made_dense, subspaces, working_dtype
from hiso_jax.zo.samplers import Blocks, Sampler, Subspace
from hiso_jax.zo.state import ScaleByZoState
from hiso_jax.zo.threefry import fold_in


def _check_bases(held: PyTree, params: PyTree, rank: int) -> None:
    """Refuse a head whose sampler draws in subspaces but whose state holds no bases."""
    bases = jax.eval_shape(lambda: subspaces(jax.random.key(0), params, rank))
    if [jnp.shape(leaf) for leaf in jax.tree.leaves(held)] != [leaf.shape for leaf in jax.tree.leaves(bases)]:
        raise ParameterError("sampler", "must not be a Subspace because the head keeps a curvature and no bases")


def _check_params(params: PyTree) -> None:
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
        raise TypeError(
            "scale_by_hiso and scale_by_zo take scalars, which optax.masked and optax.multi_transform would mask: "
            "train a part of the parameters by passing that part alone, and close over the rest"
        )
    arrays("params", params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"parameter {jax.tree_util.keystr(path) or '(the root)'} has dtype {jnp.result_type(leaf)}; "
                "trainable parameters must be floating point (pass the trainable subtree only)"
            )


def _check_update(updates: Any, params: PyTree | None, key: Any) -> None:
    is_array = isinstance(updates, jax.Array | np.ndarray)
    if not is_array or updates.ndim != 2 or not jnp.issubdtype(updates.dtype, jnp.floating):
        got = f"{updates.dtype} array of shape {updates.shape}" if is_array else f"a {type(updates).__name__}"
        raise TypeError(
            "scale_by_hiso and scale_by_zo take the [K, P] array of a round's scalars where optax takes gradients, "
            f"and so stand at the head of a chain; got {got}"
        )
    if 0 in updates.shape:
        raise ValueError(f"the [K, P] array of scalars must not be empty, got shape {updates.shape}")
    if params is None:
        raise ValueError("update needs params=: the scalars alone do not say what shapes the directions have")
    if key is None:
        raise ValueError("update needs key=, the round key from which the directions of its scalars were made")


def _add(total: PyTree, delta: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: pin(a + b), total, delta)


def _last_delta(scalars: Float[Array, "K P"], ascent: Ascent | None, make: Callable[[], PyTree]) -> PyTree:
    """The Δ of the last step: that of ``ascent`` if it is made of these ``scalars``, else a new one."""
    if ascent is None or directional_derivatives(ascent.scalars).shape != scalars.shape:
        return make()
    # A member of the chain before the head may have changed the scalars and thereby Δ.
    same = (scalars == directional_derivatives(ascent.scalars)).all()
    return lax.cond(same, lambda made: made, lambda made: make(), ascent.delta)


class LocalStep(NamedTuple):
    """The inputs of a round's local step k, for a head whose curvature needs more than Δ_k.

    Attributes:
      aggregate: the aggregate of step k, a tree of [P] arrays; [G·P] with G groups of directions.
      key: a key for rounding, different for each step.
      rounds: r, the number of earlier updates.
      direction_at: index p → z_{k,p}; with G groups of directions index g·P + p → z_{k,g,p}.
    """

    aggregate: PyTree[Shaped[Array, "GP"]]
    key: Key[Array, ""]
    rounds: Int[Array, ""]
    direction_at: Callable[[Any], PyTree]


def head(
    *,
    sampler: Directions | Sampler | str | None = None,
    curvature: Callable[[PyTree], PyTree | None] = lambda params: None,
    advance: Callable[[PyTree, PyTree, LocalStep], PyTree] = lambda curvature, delta, step: curvature,
    every_step: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The head of a chain: it turns a round's aggregate into Σ_k Δ_k, with every Δ_k shaped by H_r.

    :func:`scale_by_zo` and :func:`scale_by_hiso` are such heads; users can make their own.

    Args:
      sampler: the family of raw perturbations, as a function or by name, or :class:`~hiso_jax.zo.Directions`; None
        means gaussian.
      curvature: parameters → H_0 in their structure, or None for H = 1.
      advance: (H, Δ_k, step k) → the H after step k. Its arithmetic must be pinned (:func:`hiso_jax.zo.pin`).
      every_step: whether every Δ_k updates H, in order, or only the last.
    """
    directions = as_directions(sampler)

    def init(params: PyTree) -> ScaleByZoState:
        _check_params(params)
        first = curvature(params)
        if first is not None and isinstance(directions.sampler, Subspace):
            _check_bases(first, params, directions.sampler.rank)
        if isinstance(directions.sampler, Blocks) and any(jnp.ndim(leaf) for leaf in jax.tree.leaves(first)):
            raise ParameterError("sampler", "must not be Blocks because the head keeps a curvature and no norms")
        return ScaleByZoState(jnp.zeros([], jnp.int32), first, directions)

    def update(
        updates: PyTree[Float[Array, "K P"]],
        state: ScaleByZoState,
        params: PyTree | None = None,
        *,
        key: Any = None,
        ascent: Ascent | None = None,
        clients: int | None = None,
        visits: Visits | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByZoState]:
        if PROBE in extra_args:
            raise Reached
        scalars = directional_derivatives(updates)
        _check_update(scalars, params, key)
        if SKIP in extra_args:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, working_dtype(x)), params), state
        groups = None if clients is None else state.directions.groups_of(clients)
        if visits is not None and state.curvature is not None:
            raise ParameterError("tx", "must not keep a curvature where scalars of several rounds meet in an update")
        count = None if visits is None else len(visits.groups)
        groups = groups_in(state.directions, scalars, groups, count)
        directions_at = partial(
            state.grouped_directions, groups=groups, num_perturbations=scalars.shape[1] // (count or groups)
        )

        # Tied to the scalars: with one perturbation XLA unrolls both loops over directions and would merge their
        # draws, so that all directions stay in memory from the first forward pass to the update.
        key, updates = lax.optimization_barrier((key, jax.tree.map(jnp.asarray, updates)))
        scalars = directional_derivatives(updates)

        shape = state.curvature
        delta_of = partial(
            accumulate, key, params=params, curvature=shape, sampler=state.directions, groups=groups, visits=visits
        )

        def advance_at(shape: PyTree, delta: PyTree, step: int | Array, aggregate: PyTree) -> PyTree:
            own, directions_of = fold_in(key, step), directions_at(key, step, params).of
            given = LocalStep(aggregate, own, state.rounds, lambda index: made_dense(directions_of(index)))
            return advance(shape, delta, given)

        def body(carry: tuple[PyTree, PyTree], term: tuple[Array, PyTree]) -> tuple[tuple[PyTree, PyTree], None]:
            (total, shape), (step, aggregate) = carry, term
            delta = delta_of(directional_derivatives(aggregate), step=step)
            return (_add(total, delta), advance_at(shape, delta, step, aggregate) if every_step else shape), None

        aggregate, last_step = updates, scalars.shape[0] - 1
        delta = _last_delta(scalars, ascent, lambda: delta_of(scalars[last_step], step=last_step))
        total = delta
        if last_step:
            zero = jax.tree.map(jnp.zeros_like, delta)
            steps = (jnp.arange(last_step), jax.tree.map(lambda x: x[:last_step], aggregate))
            (total, shape), _ = lax.scan(body, (zero, shape), steps)
            total = _add(total, delta)
        shape = advance_at(shape, delta, last_step, jax.tree.map(lambda x: x[last_step], aggregate))
        return total, ScaleByZoState(optax.safe_increment(state.rounds), shape, state.directions)

    return optax.GradientTransformationExtraArgs(init, update)


def grouped(tx: optax.GradientTransformation, **changes: Any) -> optax.GradientTransformationExtraArgs:
    """``tx`` with ``changes`` to the directions of its head.

    Args:
      tx: an optimizer headed by ``scale_by_zo``, ``scale_by_hiso`` or another head.
      changes: attributes of :class:`~hiso_jax.zo.Directions`, for example ``groups`` and ``block``.

    Example:
      >>> import hiso_jax
      >>> from hiso_jax import zo
      >>> tx = zo.grouped(hiso_jax.hiso(1e-3), groups=None)  # each client its own
    """

    def is_zo(node: Any) -> bool:
        return isinstance(node, ScaleByZoState)

    def redirected(node: Any) -> Any:
        return node._replace(directions=replace(node.directions, **changes)) if is_zo(node) else node

    def init(params: PyTree) -> optax.OptState:
        return jax.tree.map(redirected, tx.init(params), is_leaf=is_zo)

    return optax.GradientTransformationExtraArgs(init, optax.with_extra_args_support(tx).update)


def scale_by_zo(*, sampler: Directions | Sampler | str | None = None) -> optax.GradientTransformationExtraArgs:
    """Turn a round's scalars into its ascent direction Σ_k Δ_k, with isotropic directions (H = 1).

    This is the estimator of MeZO (arXiv 2305.17333) and DeComFL (arXiv 2405.15861).

    Args:
      sampler: as in :func:`head`.

    Returns:
      A transformation whose ``update(scalars, state, params, key=round_key)`` takes float [K, P] scalars. With G
      groups of directions it takes [K, G·P]; if each client has its own directions it needs ``clients=``, the number
      of clients in the round. If the Δ of a single step is already known, ``ascent=Ascent(its scalars, Δ)`` avoids
      regenerating its directions, provided that the same scalars reach the update.

    Raises:
      TypeError: in ``update``, the scalars are not a [K, P] floating-point array; in ``init``, a parameter is not
        floating point.
      ValueError: in ``update``, ``params`` or ``key`` is missing.
    """
    return head(sampler=sampler)


def decomfl(
    learning_rate: optax.ScalarOrSchedule, *, sampler: Directions | Sampler | str | None = None
) -> optax.GradientTransformationExtraArgs:
    """DeComFL (arXiv 2405.15861): :func:`scale_by_zo` followed by plain gradient descent.

    Args:
      learning_rate: η, a number or an optax schedule over rounds.
      sampler: as in :func:`head`.
    """
    rate("learning_rate", learning_rate)
    return optax.chain(scale_by_zo(sampler=sampler), optax.scale_by_learning_rate(learning_rate))
