"""What the scalar-only methods share behind their heads: plain descent, with decay and momentum if asked for."""

import numpy as np
import optax
from jaxtyping import Array

from hiso_jax import zo
from hiso_jax.checks import between, finite, rate


def moving_average(old: Array, new: Array, kept: float) -> Array:
    """``kept`` · old + (1 − kept) · new, in the same bits wherever it is computed."""
    return zo.rounded(kept * old) + zo.rounded((1 - kept) * new)


def descent(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 0.0, momentum: float = 0.0
) -> optax.GradientTransformation:
    """Decoupled weight decay, heavy-ball momentum and a learning rate; the first two only where they are not 0.

    Raises:
      ValueError: ``momentum`` outside [0, 1], or ``learning_rate`` or ``weight_decay`` negative or not finite.
    """
    rate("learning_rate", learning_rate)
    finite("weight_decay", weight_decay)
    between("momentum", momentum, 0, 1)
    decay = [optax.add_decayed_weights(weight_decay)] if weight_decay else []
    trace = [optax.trace(momentum, accumulator_dtype=np.float32)] if momentum else []
    return optax.chain(*decay, *trace, optax.scale_by_learning_rate(learning_rate))
