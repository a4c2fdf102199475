"""The weighted mean (HiSo, arXiv 2506.02370, Algorithm 1)."""

from hiso_jax.fed.algorithm import Combine
from hiso_jax.fed.algorithm import mean as weighted_mean


def mean() -> Combine:
    """Σ_i w_i m_i / Σ_i w_i over the clients that count."""
    return weighted_mean
