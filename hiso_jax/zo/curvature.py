"""Directions shaped by a learned diagonal curvature: ``scale_by_hiso`` and ``hiso`` (arXiv 2506.02370)."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PyTree, Shaped

from hiso_jax.checks import ParameterError, between, finite, rate
from hiso_jax.exact import pin, rounded
from hiso_jax.factored import Factors, is_factors
from hiso_jax.stacked import is_stacked
from hiso_jax.zo.directions import Directions, as_directions, working_dtype
from hiso_jax.zo.heads import LocalStep, head
from hiso_jax.zo.partitioned import gathered
from hiso_jax.zo.rounding import CURVATURE_STREAM, store
from hiso_jax.zo.samplers import LowRank, Sampler

CurvatureUpdate = Literal["last", "all"]
CurvatureForm = Literal["diagonal", "factored"]
# Largest number of a matrix's rows in one partial sum.
SUMMED_ROWS = 256
CURVATURE_DTYPES = (jnp.float32, jnp.float64, jnp.bfloat16)


def scale_by_hiso(
    *,
    decay: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    curvature_update: CurvatureUpdate = "last",
    curvature_dtype: DTypeLike | None = None,
    curvature_form: CurvatureForm | None = None,
    sampler: Directions | Sampler | str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Turn a round's scalars into Σ_k Δ_k, along directions shaped by a learned diagonal curvature H.

    z = H_r^{-1/2} ⊙ u, Δ_k = (1/P) Σ_p ĝ_{k,p} z_{k,p}, and after the round
    H_{r+1} = γ H_r + (1 − γ)(Δ² + ε), H₀ = 1 (HiSo, arXiv 2506.02370, Algorithm 1).

    Args:
      decay: γ in [0, 1], the weight that H keeps; 1 leaves H unchanged, which is :func:`scale_by_zo`.
      eps: ε ≥ 0, added to Δ² to keep H positive.
      curvature_update: ``"last"`` updates H once, by Δ_{K−1}; ``"all"`` updates it by each Δ_k in order.
      curvature_dtype: the dtype of H; None means promote_types(leaf dtype, float32). bfloat16 halves the memory and is
        rounded stochastically, so that small updates are not lost.
      curvature_form: ``"diagonal"`` is the paper's form. ``"factored"`` keeps H = r cᵀ for each matrix of R rows and C
        columns: R + C entries, with the row and column means of the diagonal form (as Adafactor, Shazeer and Stern,
        arXiv 1804.04235). A factored H keeps the low rank of the directions that it shapes. None means factored for
        directions of low rank, else diagonal.
      sampler: as in :func:`head`.

    Returns:
      A transformation whose ``update(scalars, state, params, key=round_key)`` takes float [K, P] scalars, and
      ``ascent`` as in :func:`scale_by_zo`. ``optax.tree.get(state, "curvature")`` reads H.

    Raises:
      TypeError: in ``update``, the scalars are not a [K, P] floating-point array; in ``init``, a parameter is not
        floating point.
      ValueError: ``decay``, ``eps`` or another option is out of range; in ``update``, ``params`` or ``key`` is missing.

    Example:
      >>> import hiso_jax, jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(hiso_jax.scale_by_hiso(decay=0.95), optax.trace(0.9), optax.scale_by_learning_rate(1e-3))
      >>> params = {"w": jnp.ones((2, 3))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.ones((1, 5)), state, params, key=jax.random.key(0))
      >>> optax.tree.get(state, "curvature")["w"].shape
      (2, 3)
    """
    # optax.inject_hyperparams passes arrays, which may be traced: only plain numbers can be checked.
    between("decay", decay, 0, 1)
    finite("eps", eps)
    if curvature_update not in ("last", "all"):
        raise ParameterError("curvature_update", f"must be 'last' or 'all', got {curvature_update!r}")

    if curvature_dtype is not None and jnp.dtype(curvature_dtype) not in CURVATURE_DTYPES:
        raise ParameterError(
            "curvature_dtype", f"must be float32, float64 or bfloat16, got {jnp.dtype(curvature_dtype)}"
        )

    if curvature_form not in (None, "diagonal", "factored"):
        raise ParameterError("curvature_form", f"must be 'diagonal' or 'factored', got {curvature_form!r}")
    low_rank = isinstance(as_directions(sampler).sampler, LowRank)
    factored = curvature_form == "factored" or (curvature_form is None and low_rank)

    def advance_leaf(h: Array | Factors, delta: Array) -> Array | Factors:
        if isinstance(h, Factors):
            new: Any = _advance_factors(h, delta, decay, eps)
        else:
            h = h.astype(delta.dtype)
            new = _advance_diagonal(h, delta, decay, eps)
        # where, not 0 · Δ²: at decay 1 an infinite Δ must leave H unchanged.
        return jax.tree.map(lambda old, new: jnp.where(jnp.asarray(decay, old.dtype) == 1, old, new), h, new)

    def initial(x: Array, layers: int) -> Array | Factors:
        if factored and has_factors(jnp.shape(x)[layers:]):
            return _factors_of_one(x, layers)
        dtype = working_dtype(jnp.asarray(x)) if curvature_dtype is None else curvature_dtype
        return jnp.ones_like(x, dtype)

    def first(node: Any) -> PyTree:
        layers = int(is_stacked(node))
        return jax.tree.map(lambda x: initial(x, layers), node)

    def advance(curvature: PyTree, delta: PyTree, step: LocalStep) -> PyTree:
        moved = jax.tree.map(advance_leaf, curvature, delta, is_leaf=is_factors)
        return store(step.key, CURVATURE_STREAM, moved, curvature)

    return head(
        sampler=sampler,
        curvature=lambda params: jax.tree.map(first, params, is_leaf=is_stacked),
        advance=advance,
        every_step=curvature_update == "all",
    )


def has_factors(shape: tuple[int, ...]) -> bool:
    """Whether a factored curvature has row and column factors for a parameter of ``shape``."""
    return len(shape) > 1 and min(math.prod(shape[:-1]), shape[-1]) > 1


def _factors_of_one(x: Array, layers: int) -> Factors:
    """The factors of H = 1."""
    shape, dtype = jnp.shape(x), working_dtype(jnp.asarray(x))
    lead, own = shape[:layers], shape[layers:]
    rows, columns = jnp.ones((*lead, math.prod(own[:-1]), 1), dtype), jnp.ones((*lead, own[-1], 1), dtype)
    return Factors(rows, columns, own)


def _advance_diagonal(h: Array, delta: Array, decay: ArrayLike, eps: ArrayLike) -> Array:
    """γ H + (1 − γ)(Δ² + ε)."""
    kept = jnp.asarray(decay, h.dtype)
    square = pin(pin(jnp.square(delta)) + jnp.asarray(eps, h.dtype))
    return pin(pin(kept * h) + pin((1 - kept) * square))


def _advance_factors(h: Factors, delta: Array, decay: ArrayLike, eps: ArrayLike) -> Factors:
    """The factors of H after Δ: r holds H's row means, c its column means divided by the mean of all entries."""
    # Every product is rounded before it is added, because XLA fuses sums with their operands in some programs only.
    kept, least = jnp.asarray(decay, delta.dtype), jnp.asarray(eps, delta.dtype)

    def mixed(h: Array, mean_square: Array) -> Array:
        return rounded(kept * h) + rounded((1 - kept) * (mean_square + least))

    def mean(rows: Array) -> Array:
        return rounded(rows.mean(-2, keepdims=True))

    over_columns, over_rows = _mean_squares(gathered(delta).reshape(*h.rows.shape[:-1], h.columns.shape[-2]))
    rows = mixed(h.rows, over_columns)
    columns = mixed(rounded(h.columns * mean(h.rows)), over_rows)
    return Factors(rows, columns / mean(rows), h.own)


def _mean_squares(matrix: Float[Array, "... R C"]) -> tuple[Float[Array, "... R 1"], Float[Array, "... C 1"]]:
    """The mean square of every row and of every column.

    A loop of at least two iterations sums the matrix in pieces: XLA writes the inputs of a loop to memory, so that a
    run and its replay sum in one order.
    """
    if matrix.ndim > 2:
        return lax.map(_mean_squares, matrix)
    count, width = matrix.shape
    pieces = max(2, -(-count // SUMMED_ROWS))
    height = -(-count // pieces)
    filled = jnp.pad(matrix, ((0, pieces * height - count), (0, 0))).reshape(pieces, height, width)

    def body(total: Array, piece: Array) -> tuple[Array, Array]:
        square = rounded(jnp.square(piece))
        return total + square.sum(0), square.sum(1)

    of_columns, of_rows = lax.scan(body, jnp.zeros(width, matrix.dtype), filled)
    of_rows = of_rows.reshape(-1)[:count]
    return rounded(of_rows * (1 / width))[:, None], rounded(of_columns * (1 / count))[:, None]


def mean_square(tree: PyTree[Shaped[Array, "..."]]) -> Float[Array, ""]:
    """The mean square of all entries of a tree, with the same bits in a run and its replay."""
    leaves = [
        gathered(leaf).reshape(-1, leaf.shape[-1] if leaf.ndim > 1 else 1)
        for leaf in jax.tree.leaves(tree)
        if leaf.size
    ]
    sums = [rounded(_mean_squares(matrix)[0].sum() * matrix.shape[1]) for matrix in leaves]
    return rounded(sum(sums[1:], sums[0]) * (1 / sum(matrix.size for matrix in leaves)))


def hiso(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    curvature_update: CurvatureUpdate = "last",
    curvature_dtype: DTypeLike | None = None,
    curvature_form: CurvatureForm | None = None,
    sampler: Directions | Sampler | str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """HiSo (arXiv 2506.02370): :func:`scale_by_hiso` followed by plain gradient descent.

    Args:
      learning_rate: η, a number or an optax schedule over rounds.
      decay: γ; for all options see :func:`scale_by_hiso`.
      eps: ε.
      curvature_update: ``"last"`` or ``"all"``.
      curvature_dtype: the dtype of H.
      curvature_form: ``"diagonal"``, ``"factored"``, or None to choose by the rank of the directions.
      sampler: as in :func:`head`.

    Example:
      >>> import hiso_jax
      >>> tx = hiso_jax.hiso(learning_rate=1e-3)
    """
    rate("learning_rate", learning_rate)
    scale = scale_by_hiso(
        decay=decay,
        eps=eps,
        curvature_update=curvature_update,
        curvature_dtype=curvature_dtype,
        curvature_form=curvature_form,
        sampler=sampler,
    )
    return optax.chain(scale, optax.scale_by_learning_rate(learning_rate))
