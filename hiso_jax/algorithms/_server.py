"""Plain descent behind the heads of scalar-only methods, with optional weight decay and momentum."""

import numpy as np
import optax
from jaxtyping import Array

from hiso_jax import zo
from hiso_jax.checks import between, finite, rate


def moving_average(old: Array, new: Array, kept: float) -> Array:
    """``kept`` · old + (1 − kept) · new, with the same bits in every program."""
    return zo.rounded(kept * old) + zo.rounded((1 - kept) * new)


def descent(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 0.0, momentum: float = 0.0
) -> optax.GradientTransformation:
    """Decoupled weight decay, heavy-ball momentum and a learning rate; decay and momentum only if they are not 0.

    Raises:
      ValueError: ``momentum`` is outside [0, 1], or ``learning_rate`` or ``weight_decay`` is negative or not finite.
    """
    rate("learning_rate", learning_rate)
    finite("weight_decay", weight_decay)
    between("momentum", momentum, 0, 1)
    decay = [optax.add_decayed_weights(weight_decay)] if weight_decay else []
    trace = [optax.trace(momentum, accumulator_dtype=np.float32)] if momentum else []
    return optax.chain(*decay, *trace, optax.scale_by_learning_rate(learning_rate))
