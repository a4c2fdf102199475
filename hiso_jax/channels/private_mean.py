"""The differentially private mean (DP-FedAvg, McMahan et al., arXiv 1710.06963; of scalars, DPZero, 2310.09639)."""

from hiso_jax.checks import finite, positive
from hiso_jax.fed.algorithm import PrivateMean


def private_mean(*, clip_norm: float = 1.0, noise_multiplier: float = 1.0) -> PrivateMean:
    """Messages clipped to a fixed norm, their sum noised by the server and divided by the size of the cohort.

    Args:
      clip_norm: longest message that passes as it is, as a Euclidean norm over all its numbers.
      noise_multiplier: standard deviation of the noise on the sum of a cohort, in units of clip_norm.

    Raises:
      ValueError: ``clip_norm`` not positive, or ``noise_multiplier`` negative; or either not finite.
    """
    positive("clip_norm", clip_norm)
    finite("noise_multiplier", noise_multiplier)
    return PrivateMean(clip_norm, noise_multiplier)
