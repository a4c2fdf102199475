"""optax transformations over scalars: ``scale_by_zo``, ``scale_by_hiso`` and their aliases ``decomfl``, ``hiso``.

They stand at the head of an ``optax.chain`` and take, where optax takes gradients, the [K, P] array of scalars of
a round. All that follows in the chain is a deterministic function of seeds, scalars and shared state, so it costs
no extra byte of communication (HiSo, arXiv 2506.02370, Algorithm 1).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree, Shaped

from hiso_jax.zo.accumulate import Ascent, accumulate
from hiso_jax.zo.directions import Directions, Sampler, gaussian, working_dtype
from hiso_jax.zo.rounding import CURVATURE_STREAM, store
from hiso_jax.zo.walls import pin

CurvatureUpdate = Literal["last", "all"]
CURVATURE_DTYPES = (jnp.float32, jnp.float64, jnp.bfloat16)


class ScaleByZoState(NamedTuple):
    """State of :func:`scale_by_zo` and :func:`scale_by_hiso`.

    Attributes:
      rounds: the number of updates made, int32 scalar.
      curvature: H in the structure of the parameters, in promote_types(leaf dtype, float32) unless another dtype
        was asked for; None for H = 1.
      directions: the static description of the directions that the scalars must have been measured along.
    """

    rounds: Int[Array, ""]
    curvature: PyTree[Shaped[Array, "..."]] | None
    directions: Directions


def zo_state(state: optax.OptState) -> ScaleByZoState:
    """The one :class:`ScaleByZoState` inside an optimizer state, through any chain or wrapper.

    Raises:
      ValueError: there is none, or more than one.
    """

    def is_zo(node: Any) -> bool:
        return isinstance(node, ScaleByZoState)

    found = [node for node in jax.tree.leaves(state, is_leaf=is_zo) if is_zo(node)]
    if len(found) != 1:
        raise ValueError(
            "the optimizer must have exactly one of scale_by_hiso or scale_by_zo, at the head of its chain; "
            f"found {len(found)}"
        )
    return found[0]


# Asks an optimizer for no update, only whether its head is reached.
PROBE = "hiso_jax_probe"


class _Reached(Exception):
    """The head of a chain was asked for an update by :func:`check_chain`."""


def check_chain(tx: optax.GradientTransformationExtraArgs, params: PyTree, scalars: Float[Array, "K P"]) -> None:
    """Refuse an optimizer in which something before the head needs what only stands behind it.

    What stands before ``scale_by_hiso`` or ``scale_by_zo`` sees the scalars of a round and not the parameters.

    Args:
      tx: the optimizer.
      params: the parameters, like ``scalars`` arrays or their shapes.
      scalars: of a round, [K, P].

    Raises:
      ValueError: a member before the head keeps something like the parameters, or reads them.
    """
    # As a tree of its own, so that scalars cannot be broadcast against a single array of parameters.
    tree = [params] if jax.tree_util.treedef_is_leaf(jax.tree.structure(params)) else params
    try:
        jax.eval_shape(lambda given: tx.update(given, tx.init(_zeros(tree)), None, **{PROBE: True}), scalars)
    except _Reached:
        return
    except Exception as error:
        raise ValueError(
            "what stands before scale_by_hiso or scale_by_zo in a chain sees the [K, P] scalars of a round and not the "
            f"parameters; move trace, adam, weight decay and the like behind it ({str(error).splitlines()[0]})"
        ) from error
    raise ValueError("the optimizer's update never reaches its scale_by_hiso or scale_by_zo")


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), jnp.result_type(x)), tree)


def _check_params(params: PyTree) -> None:
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


def _scale_by_scalars(
    initial_curvature: Callable[[PyTree], PyTree | None],
    advance: Callable[[PyTree, PyTree, Any], PyTree],
    every_step: bool,
    sampler: Sampler | None,
) -> optax.GradientTransformationExtraArgs:
    """What both transformations share: Σ_k Δ_k, all with H_r, and ``advance`` of H by the last or by every Δ_k."""
    draw = gaussian if sampler is None else sampler

    def init(params: PyTree) -> ScaleByZoState:
        _check_params(params)
        curvature = initial_curvature(params)
        return ScaleByZoState(jnp.zeros([], jnp.int32), curvature, Directions(draw, curvature is not None))

    def update(
        updates: Float[Array, "K P"],
        state: ScaleByZoState,
        params: PyTree | None = None,
        *,
        key: Any = None,
        ascent: Ascent | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByZoState]:
        if PROBE in extra_args:
            raise _Reached
        _check_update(updates, params, key)

        def delta_of(step: int | Array, scalars: Array) -> PyTree:
            return accumulate(key, scalars, params, step=step, curvature=state.curvature, sampler=draw)

        def advance_at(curvature: PyTree, delta: PyTree, step: int | Array) -> PyTree:
            return advance(curvature, delta, jax.random.fold_in(key, step))

        def body(carry: tuple[PyTree, PyTree], term: tuple[Array, Array]) -> tuple[tuple[PyTree, PyTree], None]:
            total, curvature = carry
            delta = delta_of(*term)
            return (_add(total, delta), advance_at(curvature, delta, term[0]) if every_step else curvature), None

        scalars = jnp.asarray(updates)
        last_step = scalars.shape[0] - 1
        curvature = state.curvature
        if ascent is None or ascent.scalars.shape != scalars.shape:
            delta = delta_of(last_step, scalars[last_step])
        else:
            # A member of the chain before this one may have changed the scalars: their Δ is another then.
            delta = lax.cond(
                (scalars == ascent.scalars).all(), lambda made: made, lambda made: delta_of(0, scalars[0]), ascent.delta
            )
        total = delta
        if last_step:
            zero = jax.tree.map(jnp.zeros_like, delta)
            steps = (jnp.arange(last_step), scalars[:last_step])
            (total, curvature), _ = lax.scan(body, (zero, curvature), steps)
            total = _add(total, delta)
        curvature = advance_at(curvature, delta, last_step)
        return total, ScaleByZoState(optax.safe_increment(state.rounds), curvature, state.directions)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_zo(*, sampler: Sampler | None = None) -> optax.GradientTransformationExtraArgs:
    """Turn a round's scalars into its ascent direction Σ_k Δ_k, with isotropic directions (H = 1).

    This is the estimator of MeZO (arXiv 2305.17333) and DeComFL (arXiv 2405.15861).

    Args:
      sampler: the family of raw perturbations; None means gaussian.

    Returns:
      A transformation whose ``update(scalars, state, params, key=round_key)`` takes float [K, P] scalars. Where the
      Δ of a single step is at hand, ``ascent=Ascent(its scalars, Δ)`` saves making its directions again, if those are
      the scalars that reach the update.

    Raises:
      TypeError: in ``update``, anything but a [K, P] floating-point array; in ``init``, integer parameters.
      ValueError: in ``update``, ``params`` or ``key`` missing.
    """
    return _scale_by_scalars(lambda params: None, lambda curvature, delta, key: curvature, False, sampler)


def scale_by_hiso(
    *,
    decay: float = 0.95,
    eps: float = 1e-8,
    curvature_update: CurvatureUpdate = "last",
    curvature_dtype: DTypeLike | None = None,
    sampler: Sampler | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Turn a round's scalars into Σ_k Δ_k, its directions shaped by a learned diagonal curvature H.

    z = H_r^{-1/2} ⊙ u, Δ_k = (1/P) Σ_p ĝ_{k,p} z_{k,p}, and after the round
    H_{r+1} = γ H_r + (1 − γ)(Δ² + ε), H₀ = 1 (HiSo, arXiv 2506.02370, Algorithm 1).

    Args:
      decay: γ, the weight kept by H, in [0, 1]; 1 leaves H untouched, which is :func:`scale_by_zo`.
      eps: ε ≥ 0, added to Δ² to keep H positive.
      curvature_update: ``"last"`` advances H by Δ_{K−1} once, ``"all"`` by each Δ_k in order.
      curvature_dtype: in which H is kept; None means promote_types(leaf dtype, float32). bfloat16 halves its memory
        and is rounded stochastically, so that its small steps are not lost.
      sampler: the family of raw perturbations; None means gaussian.

    Returns:
      A transformation whose ``update(scalars, state, params, key=round_key)`` takes float [K, P] scalars, and
      ``ascent`` as in :func:`scale_by_zo`. H is found by ``optax.tree_utils.tree_get(state, "curvature")``.

    Raises:
      TypeError: in ``update``, anything but a [K, P] floating-point array; in ``init``, integer parameters.
      ValueError: ``decay``, ``eps``, ``curvature_update`` or ``curvature_dtype`` out of range; in ``update``,
        ``params`` or ``key`` missing.

    Example:
      >>> import hiso_jax, jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(hiso_jax.scale_by_hiso(decay=0.95), optax.trace(0.9), optax.scale_by_learning_rate(1e-3))
      >>> params = {"w": jnp.ones((2, 3))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.ones((1, 5)), state, params, key=jax.random.key(0))
      >>> optax.tree_utils.tree_get(state, "curvature")["w"].shape
      (2, 3)
    """
    # optax.inject_hyperparams passes arrays here, traced ones too: only plain numbers can be checked.
    if isinstance(decay, int | float) and not 0 <= decay <= 1:
        raise ValueError(f"decay must be in [0, 1], got {decay}")
    if isinstance(eps, int | float) and not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be a finite number ≥ 0, got {eps}")
    if curvature_update not in ("last", "all"):
        raise ValueError(f"curvature_update must be 'last' or 'all', got {curvature_update!r}")

    if curvature_dtype is not None and jnp.dtype(curvature_dtype) not in CURVATURE_DTYPES:
        raise ValueError(f"curvature_dtype must be float32, float64 or bfloat16, got {jnp.dtype(curvature_dtype)}")

    def advance_leaf(h: Array, delta: Array) -> Array:
        h = h.astype(delta.dtype)
        kept = jnp.asarray(decay, h.dtype)
        square = pin(pin(jnp.square(delta)) + jnp.asarray(eps, h.dtype))
        moved = pin(pin(kept * h) + pin((1 - kept) * square))
        # where, not 0 · Δ²: at decay 1 an infinite Δ must leave H as it was.
        return jnp.where(kept == 1, h, moved)

    def initial(x: Array) -> Array:
        dtype = working_dtype(jnp.asarray(x)) if curvature_dtype is None else curvature_dtype
        return jnp.ones(jnp.shape(x), dtype)

    def advance(curvature: PyTree, delta: PyTree, key: Any) -> PyTree:
        return store(key, CURVATURE_STREAM, jax.tree.map(advance_leaf, curvature, delta), curvature)

    return _scale_by_scalars(
        lambda params: jax.tree.map(initial, params),
        advance,
        curvature_update == "all",
        sampler,
    )


def hiso(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = 0.95,
    eps: float = 1e-8,
    curvature_update: CurvatureUpdate = "last",
    curvature_dtype: DTypeLike | None = None,
    sampler: Sampler | None = None,
) -> optax.GradientTransformationExtraArgs:
    """HiSo (arXiv 2506.02370): :func:`scale_by_hiso` followed by plain gradient descent.

    Args:
      learning_rate: η, a number or an optax schedule over rounds.
      decay: as in :func:`scale_by_hiso`, like the rest.
      eps: ε.
      curvature_update: ``"last"`` or ``"all"``.
      curvature_dtype: in which H is kept.
      sampler: the family of raw perturbations.

    Example:
      >>> import hiso_jax
      >>> tx = hiso_jax.hiso(learning_rate=1e-3)
    """
    head = scale_by_hiso(
        decay=decay, eps=eps, curvature_update=curvature_update, curvature_dtype=curvature_dtype, sampler=sampler
    )
    return optax.chain(head, optax.scale_by_learning_rate(learning_rate))


def decomfl(
    learning_rate: optax.ScalarOrSchedule, *, sampler: Sampler | None = None
) -> optax.GradientTransformationExtraArgs:
    """DeComFL (arXiv 2405.15861): :func:`scale_by_zo` followed by plain gradient descent.

    Args:
      learning_rate: η, a number or an optax schedule over rounds.
      sampler: the family of raw perturbations; None means gaussian.
    """
    return optax.chain(scale_by_zo(sampler=sampler), optax.scale_by_learning_rate(learning_rate))
