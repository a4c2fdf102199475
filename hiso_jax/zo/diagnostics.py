"""What a learned curvature is worth, and what limits a round: its directions or its data.

With H the curvature, D = H⁻¹ the shape of the directions' covariance, and Σ = ∇²f: the whitening rank
ζ = tr(H^{-1/2} Σ H^{-1/2}) and the effective rank κ = tr Σ / ‖Σ‖ are those of HiSo's analysis (arXiv 2506.02370);
tr(ΣD) / ∇ᵀD∇ is how much curvature a step along random directions meets for the descent that it makes. Where H is the
diagonal of Σ itself ζ is d: that H resembles the Hessian and that ζ is small are two claims.
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
    """Spearman's correlation; NaN where one of them is the same everywhere."""
    ranks = jnp.stack([rankdata(first), rankdata(second)])
    centred = ranks - ranks.mean(1, keepdims=True)
    sizes = jnp.linalg.norm(centred, axis=1)
    return float((centred[0] / sizes[0] * (centred[1] / sizes[1])).sum())


def shuffled_correlation(first: Float[Array, "d"], second: Float[Array, "d"], key: Key[Array, ""]) -> float:
    """:func:`rank_correlation` with the first vector's numbers dealt anew: what nothing looks like, 0 ± 1/√d."""
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
    """F = ∇ᵀD∇ of all examples, from a sample of them: without what sampling adds, tr(D Cov) / n; at least 0.

    Args:
      gradient: the mean of the sample's gradients.
      fisher: the mean of their squares.
      curvature: H.
      examples: n, in the sample.
      share: of all examples that are in it; 1 needs no correction.
    """
    seen, squares = float((gradient**2 / curvature).sum()), float((fisher / curvature).sum())
    return max(seen - (1 - share) * (squares - seen) / max(examples - 1, 1), 0.0)


def curvature_to_descent(diagonal: Float[Array, "d"], curvature: Float[Array, "d"], signal: float) -> float:
    """tr(ΣD) / ∇ᵀD∇, D = H⁻¹: the curvature that random directions meet for the descent that they make."""
    return float((diagonal / curvature).sum()) / signal if signal > 0 else float("inf")


class ScalarVariance(NamedTuple):
    """Why two clients' scalars along one direction differ.

    Attributes:
      signal: F = ∇ᵀD∇, the mean over directions of the squared mean scalar.
      between: the variance between clients, of what each would measure with all of its data.
      within: the variance within a client, from batch to batch.
    """

    signal: float
    between: float
    within: float

    @property
    def noise(self) -> float:
        """σ² / F of one client's scalar."""
        return (self.between + self.within) / self.signal if self.signal > 0 else float("inf")


def scalar_variance(scalars: Float[Array, "M B P"]) -> ScalarVariance:
    """The parts of the scalars' variance, by a one-way analysis of variance along every direction; unbiased.

    A part that is estimated below zero is zero.

    Args:
      scalars: of M ≥ 2 clients, B ≥ 2 batches each, along the same P directions.

    Raises:
      ValueError: fewer clients or batches.
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
    """How many times smaller the squared error of Δ would be.

    With s = σ² / (C F) the error of Δ from P directions that a cohort of C clients shares is (1 + s) / P, in units of
    what one exact direction leaves; with own directions it is (1 + C s) / (C P).

    Attributes:
      share: s, of client noise in the aggregate against the squared gradient.
      directions: with twice the directions.
      clients: with twice the clients a round, or half of a scalar's variance.
      own: if each client of the cohort had directions of its own.
      words: which of them pays.
    """

    share: float
    directions: float
    clients: float
    own: float
    words: str


def advice(variance: ScalarVariance, cohort: int) -> Advice:
    """What would help: more directions, more data, or own directions.

    Args:
      variance: of the clients' scalars.
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
