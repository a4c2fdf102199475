"""The quality of a learned curvature, and the limit of a round: its directions or its data.

Let H be the curvature, D = H⁻¹ the shape of the directions' covariance, and Σ = ∇²f. The whitening rank
ζ = tr(H^{-1/2} Σ H^{-1/2}) and the effective rank κ = tr Σ / ‖Σ‖ are those of HiSo's analysis (arXiv 2506.02370).
tr(ΣD) / ∇ᵀD∇ is the curvature that a step along random directions meets, relative to its descent. If H is the diagonal
of Σ, then ζ = d: "H resembles the Hessian" and "ζ is small" are two different claims.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import rankdata
from jaxtyping import Array, Float, Key

from hiso_jax.checks import ParameterError
from hiso_jax.zo.spectra import (
    Estimated,
    Spectrum,
    estimated_hessian_diagonal,
    fisher_diagonal,
    hessian_diagonal,
    product,
    spectrum,
)

__all__ = [
    "Advice",
    "Estimated",
    "ScalarVariance",
    "Spectrum",
    "advice",
    "curvature_to_descent",
    "effective_rank",
    "estimated_hessian_diagonal",
    "fisher_diagonal",
    "hessian_diagonal",
    "product",
    "rank_correlation",
    "scalar_variance",
    "shuffled_correlation",
    "spectrum",
    "squared_gradient",
    "whitening_rank",
]


def rank_correlation(first: Float[Array, "d"], second: Float[Array, "d"]) -> float:
    """Spearman's rank correlation; NaN if one of the vectors is constant."""
    ranks = jnp.stack([rankdata(first), rankdata(second)])
    centred = ranks - ranks.mean(1, keepdims=True)
    sizes = jnp.linalg.norm(centred, axis=1)
    return float((centred[0] / sizes[0] * (centred[1] / sizes[1])).sum())


def shuffled_correlation(first: Float[Array, "d"], second: Float[Array, "d"], key: Key[Array, ""]) -> float:
    """:func:`rank_correlation` with the first vector permuted at random: the value without relation, 0 ± 1/√d."""
    return rank_correlation(jax.random.permutation(key, first), second)


def whitening_rank(diagonal: Float[Array, "d"], curvature: Float[Array, "d"]) -> float:
    """ζ = Σ_i Σ_ii / H_i."""
    return float((diagonal / curvature).sum())


def effective_rank(diagonal: Float[Array, "d"], norm: float) -> float:
    """κ = tr Σ / ‖Σ‖₂."""
    return float(diagonal.sum()) / norm


def squared_gradient(
    gradient: Float[Array, "d"],
    fisher: Float[Array, "d"],
    curvature: Float[Array, "d"],
    examples: int,
    share: float = 0.0,
) -> float:
    """F = ∇ᵀD∇ of all examples, estimated from a sample without its sampling term tr(D Cov) / n; at least 0.

    Args:
      gradient: the mean of the sample's gradients.
      fisher: the mean of their squares, entry by entry.
      curvature: H.
      examples: n, the size of the sample.
      share: the sample's share of all examples; 1 needs no correction.
    """
    seen, squares = float((gradient**2 / curvature).sum()), float((fisher / curvature).sum())
    return max(seen - (1 - share) * (squares - seen) / max(examples - 1, 1), 0.0)


def curvature_to_descent(diagonal: Float[Array, "d"], curvature: Float[Array, "d"], signal: float) -> float:
    """tr(ΣD) / ∇ᵀD∇, D = H⁻¹: the curvature that random directions meet, relative to their descent."""
    return float((diagonal / curvature).sum()) / signal if signal > 0 else float("inf")


class ScalarVariance(NamedTuple):
    """The signal and the variance components of clients' scalars along one direction.

    Attributes:
      signal: F = ∇ᵀD∇, the mean over directions of the squared mean scalar.
      between: the variance between clients, if each measured with all of its data.
      within: the variance within a client, from batch to batch.
    """

    signal: float
    between: float
    within: float

    @property
    def noise(self) -> float:
        """σ² / F, the relative variance of one client's scalar."""
        return (self.between + self.within) / self.signal if self.signal > 0 else float("inf")


def scalar_variance(scalars: Float[Array, "M B P"]) -> ScalarVariance:
    """Unbiased estimates of the variance components, by a one-way analysis of variance along every direction.

    A component with a negative estimate is set to zero.

    Args:
      scalars: the scalars of M ≥ 2 clients with B ≥ 2 batches each, along the same P directions.

    Raises:
      ValueError: there are fewer than 2 clients or 2 batches.
    """
    clients, batches, _ = scalars.shape
    if clients < 2 or batches < 2:
        raise ParameterError("scalars", f"must be of at least 2 clients and 2 batches, got {clients} and {batches}")
    of_client = scalars.mean(1)
    within = scalars.var(1, ddof=1).mean()
    spread = of_client.var(0, ddof=1).mean()
    signal = (of_client.mean(0) ** 2).mean() - spread / clients
    between = spread - within / batches
    return ScalarVariance(*(max(float(part), 0.0) for part in (signal, between, within)))


class Advice(NamedTuple):
    """The factors by which changes of a round would reduce the squared error of Δ.

    Let s = σ² / (C F). If a cohort of C clients shares P directions, the error of Δ is (1 + s) / P, in units of the
    error of one exact direction. With own directions the error is (1 + C s) / (C P).

    Attributes:
      share: s, the client noise in the aggregate relative to the squared gradient.
      directions: the factor with twice the directions.
      clients: the factor with twice the clients a round, or half the variance of a scalar.
      own: the factor if each client of the cohort had its own directions.
      words: the conclusion as text.
    """

    share: float
    directions: float
    clients: float
    own: float
    words: str


def advice(variance: ScalarVariance, cohort: int) -> Advice:
    """The gains from more directions, more data or own directions.

    Args:
      variance: the variance of the clients' scalars.
      cohort: C.
    """
    share = variance.noise / cohort
    clients, own = (1 + share) / (1 + share / 2), cohort * (1 + share) / (1 + cohort * share)
    if share == float("inf"):
        clients, own = 2.0, 1.0
    limit = "directions are the bottleneck" if share < 1 else "the clients' data are the bottleneck"
    source = "between clients" if variance.between > variance.within else "between batches"
    words = (
        f"{limit}: client noise is {share:.2g} of the squared gradient in a cohort's mean, most of it {source}; the "
        f"squared error of a round falls by {own:.1f} with own directions, by 2.0 with twice the directions, by "
        f"{clients:.1f} with twice the clients"
    )
    return Advice(share, 2.0, clients, own, words)
