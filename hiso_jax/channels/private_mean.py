"""The differentially private mean (DP-FedAvg, McMahan et al., arXiv 1710.06963; of scalars, DPZero, 2310.09639)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree, Shaped

from hiso_jax.checks import finite, positive
from hiso_jax.fed.algorithm import Combine, Noise
from hiso_jax.zo import pin


def private_mean(*, clip_norm: float = 1.0, noise_multiplier: float = 1.0) -> Combine:
    """The sum of clipped messages, with noise that the server adds, divided by the size of the cohort.

    The size of the cohort is public; the number of clients that count is not. The noise is drawn from the run's secret,
    for every entry of every group of directions.

    Args:
      clip_norm: largest Euclidean norm, over all entries of a message, that is not clipped.
      noise_multiplier: standard deviation of the noise on the sum of a cohort, in units of clip_norm.

    Raises:
      ValueError: ``clip_norm`` is not positive, ``noise_multiplier`` is negative, or either is not finite.
    """
    positive("clip_norm", clip_norm)
    finite("noise_multiplier", noise_multiplier)
    deviation = noise_multiplier * clip_norm

    def noised_sum(
        messages: PyTree[Shaped[Array, "C ..."]], weights: Float[Array, "C ..."], key: Key[Array, ""]
    ) -> PyTree[Shaped[Array, "..."]]:
        def one(message: Float[Array, "C ..."], key: Key[Array, ""]) -> Array:
            counts = jnp.expand_dims(weights > 0, range(weights.ndim, message.ndim))
            total = pin(jnp.where(counts, message, 0)).sum(0)
            return pin(pin(total) + pin(deviation * jax.random.normal(key, total.shape, total.dtype)))

        leaves, structure = jax.tree.flatten(messages)
        return jax.tree.unflatten(structure, map(one, leaves, jax.random.split(key, len(leaves))))

    noise = Noise(clip_norm, noise_multiplier)
    return Combine(noised_sum, noise=noise, label=f"PrivateMean({clip_norm!r}, {noise_multiplier!r})")
