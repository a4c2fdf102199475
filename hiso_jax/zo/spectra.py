"""The exact second derivatives of a loss: diagonal and spectrum of its Hessian Σ = ∇²f, without forming the matrix.

They need gradients, which scalar-only methods do not have: they serve to examine a run, not to make one. Parameters,
directions and diagonals are flat vectors of d entries, in the order of ``jax.flatten_util.ravel_pytree``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

from hiso_jax.checks import ParameterError

Loss = Callable[[Array], Array]
"""(x [d]) → scalar."""

# Number of Hessian-vector products, or gradients, computed together.
TOGETHER = 32
# Length of Lanczos' next vector, in units of rounding error, at which the iteration ends.
EXHAUSTED = 10


class Estimated(NamedTuple):
    """A vector and its standard errors.

    Attributes:
      value: the vector, [d].
      standard_error: the standard error of each entry, [d]; zeros if the vector is exact.
    """

    value: Float[Array, "d"]
    standard_error: Float[Array, "d"]


class Spectrum(NamedTuple):
    """Eigenvalues of a symmetric matrix and their density, from Lanczos' iteration.

    Attributes:
      eigenvalues: Ritz values of every start, ascending, [starts, m]; the outermost are near the matrix's own. A start
        whose Krylov space has fewer than m dimensions repeats its largest value.
      weights: the weight of each value in the density of all eigenvalues, [starts, m]; they sum to 1 for every start.
        A repeated value has weight 0.
    """

    eigenvalues: Float[Array, "starts m"]
    weights: Float[Array, "starts m"]

    @property
    def norm(self) -> float:
        """‖Σ‖₂, the largest absolute eigenvalue."""
        return float(jnp.abs(self.eigenvalues).max())

    @property
    def negative(self) -> float:
        """The share of eigenvalues below −‖Σ‖₂ / 1000; the sign of smaller ones is uncertain."""
        below = self.eigenvalues < -1e-3 * self.norm
        return float(jnp.where(below, self.weights, 0).sum() / len(self.weights))


def product(loss: Loss, x: Float[Array, "d"], vector: Float[Array, "d"]) -> Float[Array, "d"]:
    """The product Σ v, as a directional derivative of the gradient (Pearlmutter, 1994)."""
    return jax.jvp(jax.grad(loss), (x,), (vector,))[1]


def hessian_diagonal(loss: Loss, x: Float[Array, "d"]) -> Estimated:
    """The exact diagonal of Σ, from d products.

    Args:
      loss: a twice differentiable loss.
      x: the parameters.
    """
    size = len(x)

    def entry(place: Array) -> Array:
        return product(loss, x, jnp.zeros_like(x).at[place].set(1))[place]

    value = jax.jit(lambda places: lax.map(entry, places, batch_size=TOGETHER))(jnp.arange(size))
    return Estimated(value, jnp.zeros_like(value))


def estimated_hessian_diagonal(loss: Loss, x: Float[Array, "d"], key: Key[Array, ""], *, samples: int) -> Estimated:
    """The diagonal of Σ as the mean of v ⊙ Σv over random signs v (Hutchinson; Bekas et al., 2007), with matfree.

    Args:
      loss: a twice differentiable loss.
      x: the parameters.
      key: the key of the signs.
      samples: the number of products, at least 2.

    Raises:
      ValueError: ``samples`` < 2.
      ImportError: matfree, in the extra ``diagnostics``, is not installed.
    """
    from matfree import stochtrace

    if samples < 2:
        raise ParameterError("samples", f"must be at least 2 for a standard error, got {samples}")
    sampler = stochtrace.sampler_signs(x, num=1)
    estimate = stochtrace.estimator_monte_carlo(stochtrace.monte_carlo_diagonal(), sampler)

    def one(sums: tuple[Array, Array], key: Key[Array, ""]) -> tuple[tuple[Array, Array], None]:
        own = estimate(lambda vector: product(loss, x, vector), key)
        mean, squares = sums
        return (mean + own / samples, squares + own**2 / samples), None

    @jax.jit
    def run(keys: Key[Array, "samples"]) -> tuple[Array, Array]:
        return lax.scan(one, (jnp.zeros_like(x), jnp.zeros_like(x)), keys)[0]

    mean, squares = run(jax.random.split(key, samples))
    return Estimated(mean, jnp.sqrt(jnp.maximum(squares - mean**2, 0) / (samples - 1)))


def spectrum(loss: Loss, x: Float[Array, "d"], key: Key[Array, ""], *, steps: int = 64, starts: int = 1) -> Spectrum:
    """Eigenvalues of Σ and their density, by stochastic Lanczos quadrature (Ghorbani et al., arXiv 1901.10159).

    If Σ has fewer than ``steps`` distinct eigenvalues, the Krylov space is exhausted early: the next vector is rounding
    noise, and the tridiagonal matrix is cut there.

    Args:
      loss: a twice differentiable loss.
      x: the parameters.
      key: the key of the random starts.
      steps: m, the number of products for each start; at most d.
      starts: the number of random start vectors.

    Raises:
      ValueError: a second derivative of the loss at ``x`` is not finite.
      ImportError: matfree, in the extra ``diagnostics``, is not installed.
    """
    from matfree import decomp

    steps = min(steps, len(x))
    # Arnoldi's matrix, because its lower diagonal holds the lengths of the new vectors. The symmetric form averages
    # the lower and the upper diagonal and hides a length that is only rounding error.
    arnoldi = decomp.hessenberg(steps, reortho="full", custom_vjp=False)

    @jax.jit
    def one(key: Key[Array, ""]) -> Array:
        start = jax.random.rademacher(key, x.shape, x.dtype)
        return arnoldi(lambda vector: product(loss, x, vector), start).J_small

    values, weights = np.empty((2, starts, steps))
    for place, each in enumerate(jax.random.split(key, starts)):
        found = np.linalg.eigh(_tridiagonal(np.asarray(one(each), np.float64), x))
        missing = steps - len(found.eigenvalues)
        values[place] = np.pad(found.eigenvalues, (0, missing), mode="edge")
        weights[place] = np.pad(found.eigenvectors[0] ** 2, (0, missing))
    return Spectrum(jnp.asarray(values, x.dtype), jnp.asarray(weights, x.dtype))


def _tridiagonal(hessenberg: Float[np.ndarray, "m m"], x: Float[Array, "d"]) -> Float[np.ndarray, "n n"]:
    """Lanczos' matrix up to the step that exhausts the Krylov space, n ≤ m."""
    diagonal, beside = np.diag(hessenberg), np.diag(hessenberg, -1)
    steps = len(diagonal)
    if not np.isfinite(diagonal[0]):
        raise ParameterError(
            "loss", "must have finite second derivatives at x; a product with its Hessian is not finite"
        )
    # The length of a vector of d rounding errors, in units of the largest eigenvalue seen so far.
    rounding = EXHAUSTED * float(jnp.finfo(x.dtype).eps) * len(x) ** 0.5
    for step, length in enumerate(beside):
        scale = max(np.abs(diagonal[: step + 1]).max(), beside[:step].max(initial=0))
        if not length > rounding * scale:
            steps = step + 1
            break
    beside = beside[: steps - 1]
    return np.diag(diagonal[:steps]) + np.diag(beside, 1) + np.diag(beside, -1)


def fisher_diagonal(
    losses: Callable[[Array, Any], Array], x: Float[Array, "d"], batch: Any, *, together: int = TOGETHER
) -> Float[Array, "d"]:
    """The diagonal of the empirical Fisher information, the mean over examples of the squared gradient, [d].

    Args:
      losses: (x, examples [n, ...]) → the loss of each example, [n].
      x: the parameters.
      batch: the examples, a tree of [n, ...].
      together: the number of examples whose gradients are in memory at a time.
    """
    total = jax.tree.leaves(batch)[0].shape[0]

    def squared(example: Any) -> Array:
        alone = jax.tree.map(lambda leaf: leaf[None], example)
        return jnp.square(jax.grad(lambda x: losses(x, alone)[0])(x))

    def piece(sums: Array, part: tuple[Any, Array]) -> tuple[Array, None]:
        examples, counts = part
        return sums + (jax.vmap(squared)(examples) * counts[:, None]).sum(0), None

    pieces = -(-total // together)

    def cut(leaf: Array) -> Array:
        padded = jnp.pad(leaf, [(0, pieces * together - total)] + [(0, 0)] * (leaf.ndim - 1), mode="edge")
        return padded.reshape(pieces, together, *leaf.shape[1:])

    counted = jnp.pad(jnp.ones(total, x.dtype), (0, pieces * together - total)).reshape(pieces, together)
    parts = jax.tree.map(lambda leaf: cut(jnp.asarray(leaf)), batch), counted
    return jax.jit(lambda parts: lax.scan(piece, jnp.zeros_like(x), parts)[0])(parts) / total
