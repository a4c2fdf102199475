"""Populations of any size: each client exists only as a key and draws its examples from a shared pool."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from hiso_jax.checks import ParameterError, integer, is_integer, positive
from hiso_jax.fed.keys import population_key
from hiso_jax.fed.population.columns import KINDS, column_of
from hiso_jax.zo import fold_in

_MIXTURE, _SIZE, _EXAMPLES = range(3)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class VirtualPopulation:
    """A population of N clients that are not stored: the data of client i is a function of its key, fold_in(key, i).

    A client's label mixture is drawn from a Dirichlet distribution, and its size log-uniformly. Its j-th example,
    j < size, is drawn in two steps: a label, then an example of the pool with that label. Two clients may hold the same
    example.

    Attributes:
      key: the key from which the clients' keys are derived.
      pool: example indices sorted by label, int32 [examples].
      offsets: label l is at ``pool[offsets[l]:offsets[l + 1]]``, int32 [labels + 1].
      concentration: the Dirichlet's parameters, [labels]; None gives every client the pool's label mixture.
      sizes: the smallest and the largest number of examples of a client, [2].
      num_clients: N.
    """

    key: Any
    pool: Any
    offsets: Any
    concentration: Any
    sizes: Any
    num_clients: int = field(metadata={"static": True})

    def __repr__(self) -> str:
        """The number of clients, and the size of the pool."""
        return f"VirtualPopulation of {self.num_clients:,} clients that draw from {self.pool.shape[0]:,} examples"

    def check(self, examples: int) -> None:
        """Refuse a population that does not fit ``examples`` training examples.

        Raises:
          ValueError: an example index is out of range.
        """
        largest = int(np.max(self.pool))
        if largest >= examples:
            raise ParameterError("population", f"names example {largest}; the task has {examples} training examples")

    def _size(self, client_key: Key[Array, ""]) -> Int[Array, ""]:
        low, high = jnp.log(jnp.asarray(self.sizes, jnp.float32) + jnp.array([0.0, 1.0]))
        drawn = jnp.exp(jax.random.uniform(fold_in(client_key, _SIZE), minval=low, maxval=high))
        return jnp.clip(drawn.astype(jnp.int32), self.sizes[0], self.sizes[1])

    def _label_bounds(self, client_key: Key[Array, ""]) -> Float[Array, "L"]:
        """The cumulative label mixture of a client, [L]."""
        counts = (self.offsets[1:] - self.offsets[:-1]).astype(jnp.float32)
        if self.concentration is None:
            mixture = counts
        else:
            # A Dirichlet draw as normalised gamma draws, in logarithms: at small α every gamma draw may underflow.
            logs = jax.random.loggamma(fold_in(client_key, _MIXTURE), jnp.asarray(self.concentration))
            mixture = jnp.where(counts > 0, jnp.exp(logs - logs.max()), 0)
        bounds = jnp.cumsum(mixture)
        return bounds / bounds[-1]

    def sizes_of(self, clients: Int[Array, "C"]) -> Int[Array, "C"]:
        """The number of examples that each of ``clients`` holds, [C]."""
        return jax.vmap(lambda client: self._size(fold_in(self.key, client)))(clients)

    def sample(self, key: Key[Array, ""], clients: Int[Array, "C"], shape: tuple[int, ...]) -> Int[Array, "C ..."]:
        """Example indices drawn uniformly with replacement from each client's own examples, int32 [C, …shape].

        A client's draw depends only on the key and the client, not on its place in the cohort.
        """
        offsets = jnp.asarray(self.offsets)

        def draw(client: Int[Array, ""]) -> Int[Array, "..."]:
            own = fold_in(self.key, client)
            bounds, examples_key = self._label_bounds(own), fold_in(own, _EXAMPLES)

            def example(slot: Int[Array, ""]) -> Int[Array, ""]:
                which, where = jax.random.uniform(fold_in(examples_key, slot), (2,))
                label = jnp.minimum(jnp.sum(which >= bounds), len(bounds) - 1)
                begin, count = offsets[label], offsets[label + 1] - offsets[label]
                # where · count may round up to the count itself.
                return jnp.asarray(self.pool)[begin + jnp.minimum((where * count).astype(jnp.int32), count - 1)]

            slots = jax.random.randint(fold_in(key, client), shape, 0, self._size(own))
            return jax.vmap(example)(slots.reshape(-1)).reshape(shape)

        return jax.vmap(draw)(clients)


def virtual(
    labels: Int[np.ndarray, "n"],
    clients: int,
    *,
    alpha: float | None = None,
    sizes: tuple[int, int] = (16, 256),
    seed: int = 0,
) -> VirtualPopulation:
    """A population of any size over a task's training examples; its memory does not grow with the number of clients.

    Args:
      labels: the label of every training example.
      clients: number of clients N, 1 ≤ N < 2³¹.
      alpha: concentration α > 0 of the clients' label mixtures, Dirichlet(α·L·p) for L labels of frequencies p, so
        that balanced labels give Dirichlet(α, …, α); None gives every client the mixture p.
      sizes: fewest and most examples of a client; sizes are log-uniform in between.
      seed: seed of all clients.

    Raises:
      ValueError: ``labels`` is not one value for each example, or N, α, the sizes or the seed are out of range.
    """
    integer("clients", clients, 1, 2**31)
    if alpha is not None:
        positive("alpha", alpha)
    if not all(map(is_integer, sizes)) or not 1 <= sizes[0] <= sizes[1] < 2**31:
        raise ParameterError("sizes", f"must be two numbers 1 ≤ fewest ≤ most < 2^31, got {sizes[0]}, {sizes[1]}")
    labels = column_of("labels", labels, *KINDS)
    integer("seed", seed, 0, 2**32)
    _, counts = np.unique(labels, return_counts=True)
    return VirtualPopulation(
        key=population_key(jax.random.key(seed)),
        pool=np.argsort(labels, kind="stable").astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        concentration=None if alpha is None else (alpha * counts / counts.mean()).astype(np.float32),
        sizes=np.array(sizes, np.int32),
        num_clients=clients,
    )
