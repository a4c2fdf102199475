"""Clients on machines of their own: the server knows how many examples each holds, and no example."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from hiso_jax.checks import ParameterError


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class RemotePopulation:
    """A population whose examples are elsewhere.

    Attributes:
      sizes: the number of examples that each client holds, int32 [N].
    """

    sizes: Any

    def __repr__(self) -> str:
        """The number of clients."""
        return f"RemotePopulation of {self.num_clients:,} clients"

    @property
    def num_clients(self) -> int:
        """N, the number of clients."""
        return self.sizes.shape[0]

    def check(self, examples: int) -> None:
        """Refuse a population without clients, or a client without examples; ``examples`` is not read.

        Raises:
          ParameterError: there is no client, or one holds nothing.
        """
        sizes = np.asarray(self.sizes)
        if not len(sizes) or sizes.min() < 1:
            raise ParameterError("population", "must have a client, and every client an example")

    def sizes_of(self, clients: Int[Array, "C"]) -> Int[Array, "C"]:
        """The number of examples that each of ``clients`` holds, [C]."""
        return jnp.asarray(self.sizes)[clients]

    def sample(self, key: Key[Array, ""], clients: Int[Array, "C"], shape: tuple[int, ...]) -> Int[Array, "C ..."]:
        """Zeros of the shape of the draws: the server traces the clients' program for its shapes, and never runs it."""
        return jnp.zeros((len(clients), *shape), jnp.int32)
