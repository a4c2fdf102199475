"""A linear layer that applies a perturbed kernel without making a perturbed copy."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hiso_jax.factored import PerturbedParameter, product


class Linear(nnx.Linear):
    """``flax.nnx.Linear``, whose kernel may also be a :class:`hiso_jax.factored.PerturbedParameter`."""

    def __call__(self, inputs: Float[Array, "... R"], out_sharding: Any = None) -> Float[Array, "... C"]:
        """``inputs @ kernel + bias``."""
        kernel = self.kernel.get_value()
        if not isinstance(kernel, PerturbedParameter):
            return super().__call__(inputs)
        bias = None if self.bias is None else self.bias[...]
        dtype = self.dtype or jnp.result_type(inputs, kernel.base, *([] if bias is None else [bias]))
        outputs = product(inputs.astype(dtype), kernel)
        return outputs if bias is None else outputs + bias.astype(dtype)
