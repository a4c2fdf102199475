"""A run seen with derivatives that it never had: what its curvature resembles, and what limits its rounds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from hiso_jax.checks import integer
from hiso_jax.fed.codes import offsets_of
from hiso_jax.fed.population import AnyPopulation
from hiso_jax.fed.task import Task, bind, examples_of, frozen_of
from hiso_jax.zo import diagnostics as zo
from hiso_jax.zo import made_dense, zo_states

# Messages around a round of which the scalars' mean and spread are told.
WINDOW = 20


@dataclass(frozen=True)
class Effort:
    """How much a diagnosis may cost.

    Attributes:
      examples: training examples whose mean loss is the objective; fewer if there are fewer.
      exact_up_to: parameters up to which the Hessian's diagonal is exact, a gradient's derivative each.
      samples: beyond, random signs of which it is estimated.
      lanczos_steps: derivatives of a gradient for the spectrum.
      clients, batches, directions: of which scalars are compared.
      together: examples whose gradients are in memory at a time.

    Raises:
      ValueError: a number out of range.
    """

    examples: int = 1024
    exact_up_to: int = 5000
    samples: int = 64
    lanczos_steps: int = 48
    clients: int = 32
    batches: int = 4
    directions: int = 16
    together: int = 32

    def __post_init__(self) -> None:
        """Check every range."""
        for name in ("examples", "lanczos_steps", "directions", "together"):
            integer(name, getattr(self, name), 1)
        for name in ("samples", "clients", "batches"):
            integer(name, getattr(self, name), 2)
        integer("exact_up_to", self.exact_up_to, 0)


class Diagnosis(NamedTuple):
    """A model and its curvature at one round.

    Attributes:
      round: after how many rounds.
      loss: of the sampled examples.
      hessian: Spearman's correlation of H with the true diagonal of the Hessian; None where there is no H, or it is the
        same everywhere.
      fisher: the same with the diagonal of the empirical Fisher information.
      shuffled: the same with the true diagonal, the numbers of H dealt anew: chance.
      fisher_hessian: of the Fisher's diagonal with the true one: what gradients would have told.
      curvature_spread: H at its 95th percentile over that at its 5th.
      diagonal_error: the standard error of the diagonal, over its own spread; 0 if exact.
      whitening_rank: ζ with H, or with 1 where there is no H.
      isotropic_rank: ζ that an H of the same mean everywhere would have.
      effective_rank: κ.
      norm: ‖Σ‖₂.
      trace: tr Σ.
      negative: share of eigenvalues below −‖Σ‖₂ / 1000.
      curvature_to_descent: tr(ΣD) / ∇ᵀD∇.
      isotropic_to_descent: the same with D = 1.
      signal, between, within: of the scalars' variance; F is 0 where the sample does not tell it from none.
      noise: σ² / F of one client's scalar.
      share: σ² / (C F).
      own: how many times own directions would lower the squared error of a round.
      offset: mean / sd of a message's scalars, averaged over the rounds around; None where none are kept.
      words: what would help.
    """

    round: int
    loss: float
    hessian: float | None
    fisher: float | None
    shuffled: float | None
    fisher_hessian: float
    curvature_spread: float | None
    diagonal_error: float
    whitening_rank: float
    isotropic_rank: float
    effective_rank: float
    norm: float
    trace: float
    negative: float
    curvature_to_descent: float
    isotropic_to_descent: float
    signal: float
    between: float
    within: float
    noise: float
    share: float
    own: float
    offset: float | None
    words: str


class Vectors(NamedTuple):
    """What a diagnosis is made of, for pictures.

    Attributes:
      diagonal: of the Hessian, [d].
      curvature: H, [d], or None.
      eigenvalues, weights: of the spectrum, [m].
    """

    diagonal: Float[np.ndarray, "d"]
    curvature: Float[np.ndarray, "d"] | None
    eigenvalues: Float[np.ndarray, "m"]
    weights: Float[np.ndarray, "m"]


class Examined(NamedTuple):
    """What is to be diagnosed.

    Attributes:
      task: the model, its loss and its data.
      population: who holds which training examples.
      cohort: C.
      batch_size: examples of a local step.
      params: the parameters.
      state: the optimizer's.
      round: after how many rounds these are.
    """

    task: Task
    population: AnyPopulation
    cohort: int
    batch_size: int
    params: PyTree
    state: Any
    round: int


def curvature_of(state: Any, params: PyTree) -> Float[Array, "d"] | None:
    """H as one vector, in the order of ``ravel_pytree(params)``; None if the method has none."""
    heads = zo_states(state)
    if len(heads) != 1 or heads[0].curvature is None:
        return None
    own = made_dense(heads[0].curvature)
    return ravel_pytree(jax.tree.map(lambda h, x: jnp.broadcast_to(h, x.shape).astype(jnp.float32), own, params))[0]


def diagnose(
    examined: Examined, key: Key[Array, ""], effort: Effort, offset: float | None = None
) -> tuple[Diagnosis, Vectors]:
    """Look at a model and its curvature.

    Args:
      examined: what at.
      key: of the examples, clients, batches, directions and signs that are drawn.
      effort: how much it may cost.
      offset: of the scalars around, see :func:`offset_of`.

    Raises:
      ImportError: matfree is not installed, the extra ``diagnostics``.
    """
    task, params = examined.task, examined.params
    x, unravel = ravel_pytree(
        jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), params)
    )
    bound = bind(task.loss, jax.tree.map(jnp.asarray, frozen_of(task)))
    keys = jax.random.split(key, 6)

    def losses(x: Array, batch: PyTree) -> Array:
        return bound(unravel(x), batch)

    total = examples_of(task.train)
    drawn = jax.random.permutation(keys[0], total)[: min(effort.examples, total)]
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf)[drawn], task.train)
    mean = _mean_loss(losses, batch, effort.together)
    loss, gradient = jax.jit(jax.value_and_grad(mean))(x)
    if len(x) <= effort.exact_up_to:
        diagonal = zo.hessian_diagonal(mean, x)
    else:
        diagonal = zo.estimated_hessian_diagonal(mean, x, keys[1], samples=effort.samples)
    spectrum = zo.spectrum(mean, x, keys[2], steps=effort.lanczos_steps)
    fisher = zo.fisher_diagonal(losses, x, batch, together=effort.together)
    curvature = curvature_of(examined.state, params)
    shape = jnp.ones_like(x) if curvature is None else curvature.astype(x.dtype)
    varies = curvature is not None and bool(jnp.ptp(shape))
    scalars = _scalars(examined, losses, x, shape, effort, keys[3])
    # F from the gradient: a difference of squares of a few clients would be less certain.
    sampled = len(drawn), len(drawn) / total
    signal, plain = (zo.squared_gradient(gradient, fisher, h, *sampled) for h in (shape, jnp.ones_like(x)))
    variance = zo.scalar_variance(scalars)._replace(signal=signal)
    advice = zo.advice(variance, examined.cohort)
    middle = jnp.percentile(shape, jnp.array([5.0, 95.0]))
    found = Diagnosis(
        round=examined.round,
        loss=float(loss),
        hessian=zo.rank_correlation(shape, diagonal.value) if varies else None,
        fisher=zo.rank_correlation(shape, fisher) if varies else None,
        shuffled=zo.shuffled_correlation(shape, diagonal.value, keys[4]) if varies else None,
        fisher_hessian=zo.rank_correlation(fisher, diagonal.value),
        curvature_spread=float(middle[1] / middle[0]) if varies else None,
        diagonal_error=float(jnp.sqrt(jnp.square(diagonal.standard_error).mean()) / diagonal.value.std()),
        whitening_rank=zo.whitening_rank(diagonal.value, shape),
        isotropic_rank=zo.whitening_rank(diagonal.value, jnp.full_like(shape, shape.mean())),
        effective_rank=zo.effective_rank(diagonal.value, spectrum.norm),
        norm=spectrum.norm,
        trace=float(diagonal.value.sum()),
        negative=spectrum.negative,
        curvature_to_descent=zo.curvature_to_descent(diagonal.value, shape, signal),
        isotropic_to_descent=zo.curvature_to_descent(diagonal.value, jnp.ones_like(x), plain),
        **variance._asdict(),
        noise=variance.noise,
        **{name: getattr(advice, name) for name in ("share", "own", "words")},
        offset=offset,
    )
    seen = diagonal.value, curvature, spectrum.eigenvalues[0], spectrum.weights[0]
    return found, Vectors(*jax.tree.map(np.asarray, seen))


def _mean_loss(losses: Callable[[Array, PyTree], Array], batch: PyTree, together: int) -> Callable[[Array], Array]:
    """The mean loss of a batch, so that a piece's activations are in memory at a time."""
    total = jax.tree.leaves(batch)[0].shape[0]
    whole_pieces = total // together

    def piece(x: Array, part: PyTree) -> Array:
        return jax.checkpoint(lambda x: losses(x, part).astype(x.dtype).sum())(x)

    def mean(x: Array) -> Array:
        cut = jax.tree.map(lambda leaf: leaf[: whole_pieces * together].reshape(-1, together, *leaf.shape[1:]), batch)
        summed = lax.map(lambda part: piece(x, part), cut).sum() if whole_pieces else jnp.zeros((), x.dtype)
        rest = jax.tree.map(lambda leaf: leaf[whole_pieces * together :], batch)
        return (summed + (piece(x, rest) if total % together else 0)) / total

    return mean


def _scalars(
    examined: Examined,
    losses: Callable[[Array, PyTree], Array],
    x: Float[Array, "d"],
    shape: Float[Array, "d"],
    effort: Effort,
    key: Key[Array, ""],
) -> Float[Array, "M B P"]:
    """Exact directional derivatives of clients' batch losses along the same shaped directions."""
    population, train = examined.population, examined.task.train
    who, what, along = jax.random.split(key, 3)
    clients = jax.random.choice(
        who, population.num_clients, (min(effort.clients, population.num_clients),), replace=False
    )
    numbers: Int[Array, "M B n"] = population.sample(what, clients, (effort.batches, examined.batch_size))

    def one(key: Key[Array, ""]) -> Float[Array, "M B"]:
        direction = jax.random.normal(key, x.shape, x.dtype) / jnp.sqrt(shape)

        def batch(own: Int[Array, "n"]) -> Array:
            examples = jax.tree.map(lambda leaf: jnp.asarray(leaf)[own], train)
            return jax.jvp(lambda x: losses(x, examples).mean(), (x,), (direction,))[1]

        flat = numbers.reshape(-1, numbers.shape[-1])
        return lax.map(batch, flat).reshape(numbers.shape[:2])

    return jnp.moveaxis(jax.jit(lambda keys: lax.map(one, keys))(jax.random.split(along, effort.directions)), 0, -1)


def offset_of(scalars: PyTree, valid: Bool[np.ndarray, "R C"], at: int) -> float | None:
    """The mean of :func:`~hiso_jax.fed.codes.offsets_of` over some rounds around ``at``; None if there are none.

    Args:
      scalars: of the ledger, [R, C, K, P] or coded.
      valid: which of them count.
      at: a number of rounds.
    """
    rows = slice(max(0, at - WINDOW // 2), at + WINDOW // 2)
    found = offsets_of(jax.tree.map(lambda column: column[rows], scalars), valid[rows])
    whole = np.concatenate(found) if found else np.zeros(0)
    return float(whole.mean()) if len(whole) else None
