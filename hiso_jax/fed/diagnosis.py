"""Diagnosis of a run with exact derivatives: how good its curvature is, and what limits the progress of its rounds."""

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

# Rounds around a round over which the offset of the scalars is averaged.
WINDOW = 20


@dataclass(frozen=True)
class Effort:
    """The cost limits of a diagnosis.

    Attributes:
      examples: training examples whose mean loss is the objective; all of them if there are fewer.
      exact_up_to: number of parameters up to which the Hessian's diagonal is exact, one Hessian-vector product each.
      samples: random sign vectors that estimate the diagonal of a larger model.
      lanczos_steps: Hessian-vector products for the spectrum.
      clients, batches, directions: clients, batches of each, and directions whose scalars are compared.
      together: examples whose gradients are in memory at a time.

    Raises:
      ValueError: a value is out of range.
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
    """The measurements of a model and its curvature at one round.

    Attributes:
      round: the number of rounds before the diagnosis.
      loss: the mean loss of the sampled examples.
      hessian: Spearman's correlation of H with the true diagonal of the Hessian; None if there is no H, or it is
        constant.
      fisher: Spearman's correlation of H with the diagonal of the empirical Fisher information.
      shuffled: Spearman's correlation of a random permutation of H with the true diagonal: the chance level.
      fisher_hessian: Spearman's correlation of the Fisher's diagonal with the true one: the value that gradients give.
      curvature_spread: the 95th percentile of H over its 5th.
      diagonal_error: the standard error of the diagonal over the diagonal's standard deviation; 0 if it is exact.
      whitening_rank: ζ with H, or with 1 if there is no H.
      isotropic_rank: ζ with a constant H of the same mean.
      effective_rank: κ.
      norm: ‖Σ‖₂.
      trace: tr Σ.
      negative: the share of eigenvalues below −‖Σ‖₂ / 1000.
      curvature_to_descent: tr(ΣD) / ∇ᵀD∇.
      isotropic_to_descent: tr(ΣD) / ∇ᵀD∇ with D = 1.
      signal, between, within: the parts of the scalars' variance; F is 0 if the sample cannot distinguish it from 0.
      noise: σ² / F of one client's scalar.
      share: σ² / (C F).
      own: the factor by which separate directions for each client would lower the squared error of a round.
      offset: mean / sd of a message's scalars, averaged over nearby rounds; None if no scalars are kept.
      words: advice in words.
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
    """The arrays behind a diagnosis, for pictures.

    Attributes:
      diagonal: the diagonal of the Hessian, [d].
      curvature: H, [d], or None.
      eigenvalues, weights: the eigenvalues and weights of the spectrum, [m].
    """

    diagonal: Float[np.ndarray, "d"]
    curvature: Float[np.ndarray, "d"] | None
    eigenvalues: Float[np.ndarray, "m"]
    weights: Float[np.ndarray, "m"]


class Examined(NamedTuple):
    """The inputs of a diagnosis.

    Attributes:
      task: the model, its loss and its data.
      population: the clients and the training examples that each holds.
      cohort: C.
      batch_size: the examples of a local step.
      params: the parameters.
      state: the optimizer's state.
      round: the number of rounds that led to ``params`` and ``state``.
    """

    task: Task
    population: AnyPopulation
    cohort: int
    batch_size: int
    params: PyTree
    state: Any
    round: int


def curvature_of(state: Any, params: PyTree) -> Float[Array, "d"] | None:
    """H as one vector, in the order of ``ravel_pytree(params)``; None if the method has no curvature."""
    heads = zo_states(state)
    if len(heads) != 1 or heads[0].curvature is None:
        return None
    own = made_dense(heads[0].curvature)
    return ravel_pytree(jax.tree.map(lambda h, x: jnp.broadcast_to(h, x.shape).astype(jnp.float32), own, params))[0]


def diagnose(
    examined: Examined, key: Key[Array, ""], effort: Effort, offset: float | None = None
) -> tuple[Diagnosis, Vectors]:
    """Diagnose a model and its curvature.

    Args:
      examined: the model and its data.
      key: key of the random examples, clients, batches, directions and signs.
      effort: the cost limits.
      offset: the offset of the scalars of nearby rounds, see :func:`offset_of`.

    Raises:
      ImportError: matfree (extra ``diagnostics``) is not installed.
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
    # F comes from the gradient: a difference of squares over a few clients would be less accurate.
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
    """The mean loss of a batch as a function; only the activations of one piece are in memory at a time."""
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
    """The exact directional derivatives of clients' batch losses along the same shaped directions."""
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
    """The mean of :func:`~hiso_jax.fed.codes.offsets_of` over the rounds around ``at``; None if there are no offsets.

    Args:
      scalars: the ledger's scalars, [R, C, K, P] or coded.
      valid: mask of the messages that count.
      at: the number of rounds at the centre of the window.
    """
    rows = slice(max(0, at - WINDOW // 2), at + WINDOW // 2)
    found = offsets_of(jax.tree.map(lambda column: column[rows], scalars), valid[rows])
    whole = np.concatenate(found) if found else np.zeros(0)
    return float(whole.mean()) if len(whole) else None
