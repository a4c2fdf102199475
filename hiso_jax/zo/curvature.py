"""Directions shaped by a learned diagonal curvature: ``scale_by_hiso`` and ``hiso`` (arXiv 2506.02370)."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, PyTree

from hiso_jax.checks import between, finite, rate
from hiso_jax.zo.directions import Directions, Sampler, working_dtype
from hiso_jax.zo.heads import LocalStep, head
from hiso_jax.zo.rounding import CURVATURE_STREAM, store
from hiso_jax.zo.walls import pin

CurvatureUpdate = Literal["last", "all"]
CURVATURE_DTYPES = (jnp.float32, jnp.float64, jnp.bfloat16)


def scale_by_hiso(
    *,
    decay: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    curvature_update: CurvatureUpdate = "last",
    curvature_dtype: DTypeLike | None = None,
    sampler: Directions | Sampler | str | None = None,
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
      sampler: as in :func:`head`.

    Returns:
      A transformation whose ``update(scalars, state, params, key=round_key)`` takes float [K, P] scalars, and
      ``ascent`` as in :func:`scale_by_zo`. H is found by ``optax.tree.get(state, "curvature")``.

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
      >>> optax.tree.get(state, "curvature")["w"].shape
      (2, 3)
    """
    # optax.inject_hyperparams passes arrays here, traced ones too: only plain numbers can be checked.
    between("decay", decay, 0, 1)
    finite("eps", eps)
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
        return jnp.ones_like(x, dtype)

    def advance(curvature: PyTree, delta: PyTree, step: LocalStep) -> PyTree:
        return store(step.key, CURVATURE_STREAM, jax.tree.map(advance_leaf, curvature, delta), curvature)

    return head(
        sampler=sampler,
        curvature=lambda params: jax.tree.map(initial, params),
        advance=advance,
        every_step=curvature_update == "all",
    )


def hiso(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    curvature_update: CurvatureUpdate = "last",
    curvature_dtype: DTypeLike | None = None,
    sampler: Directions | Sampler | str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """HiSo (arXiv 2506.02370): :func:`scale_by_hiso` followed by plain gradient descent.

    Args:
      learning_rate: η, a number or an optax schedule over rounds.
      decay: as in :func:`scale_by_hiso`, like the rest.
      eps: ε.
      curvature_update: ``"last"`` or ``"all"``.
      curvature_dtype: in which H is kept.
      sampler: as in :func:`head`.

    Example:
      >>> import hiso_jax
      >>> tx = hiso_jax.hiso(learning_rate=1e-3)
    """
    rate("learning_rate", learning_rate)
    scale = scale_by_hiso(
        decay=decay, eps=eps, curvature_update=curvature_update, curvature_dtype=curvature_dtype, sampler=sampler
    )
    return optax.chain(scale, optax.scale_by_learning_rate(learning_rate))
