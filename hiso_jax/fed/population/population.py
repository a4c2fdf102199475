"""The protocol of populations, and a population stored as offsets into a permuted array of example indices."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from hiso_jax.checks import ParameterError, of_kind
from hiso_jax.zo import drawn, fold_in


@runtime_checkable
class AnyPopulation(Protocol):
    """The protocol of a population, which :class:`Population` and ``VirtualPopulation`` implement."""

    @property
    def num_clients(self) -> int:
        """N, the number of clients."""

    def check(self, examples: int) -> None:
        """Raise a ValueError if the population does not fit ``examples`` training examples."""

    def sizes_of(self, clients: Int[Array, "C"]) -> Int[Array, "C"]:
        """The number of examples that each of ``clients`` holds, [C]."""

    def sample(self, key: Key[Array, ""], clients: Int[Array, "C"], shape: tuple[int, ...]) -> Int[Array, "C ..."]:
        """Example indices drawn uniformly with replacement from each client's own examples, int32 [C, …shape]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Population:
    """A partition of a task's training examples among clients.

    Attributes:
      indices: example indices, grouped by client, int32 [examples].
      offsets: client i holds ``indices[offsets[i]:offsets[i + 1]]``, int32 [clients + 1].
    """

    indices: Any
    offsets: Any

    def __post_init__(self) -> None:
        """Lists become arrays; JAX may put its own objects in the place of arrays."""
        for name in ("indices", "offsets"):
            given = getattr(self, name)
            if isinstance(given, list) and all(isinstance(each, int | np.integer) for each in given):
                object.__setattr__(self, name, np.asarray(given, np.int32))

    def __repr__(self) -> str:
        """The number of clients, and how many examples they hold."""
        if not isinstance(self.offsets, np.ndarray | jax.Array) or isinstance(self.offsets, jax.core.Tracer):
            return "Population"
        sizes = np.asarray(self.sizes)
        held = f"{sizes.min():,} to {sizes.max():,} examples, {sizes.sum():,} in all"
        return f"Population of {len(sizes):,} clients with {held}"

    @property
    def num_clients(self) -> int:
        """N, the number of clients."""
        return self.offsets.shape[0] - 1

    @property
    def sizes(self) -> Int[Array | np.ndarray, "N"]:
        """The number of examples that each client holds, [N]."""
        return self.offsets[1:] - self.offsets[:-1]

    def check(self, examples: int) -> None:
        """Refuse a malformed population, or a population that does not fit ``examples`` training examples.

        Raises:
          ValueError: an index is out of range, the offsets do not run from 0 to the number of indices, or a client
            holds no example.
        """
        held, offsets = np.asarray(self.indices), np.asarray(self.offsets)
        for name, array in (("indices", held), ("offsets", offsets)):
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise ParameterError(
                    name, f"must be one-dimensional integers, got {array.dtype} of shape {array.shape}"
                )
        if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(held):
            ends = f"{offsets[0]} and {offsets[-1]}" if len(offsets) else "none"
            raise ParameterError(
                "offsets",
                f"must begin at 0 and end at the number of indices, {len(held)}, with an entry more than there "
                f"are clients; got {ends}",
            )
        sizes = np.diff(offsets.astype(np.int64))
        if (sizes < 1).any():
            client = int(np.argmax(sizes < 1))
            what = "no example" if sizes[client] == 0 else "offsets that decrease"
            raise ParameterError("offsets", f"must give every client at least one example; client {client} has {what}")
        if held.size and (held.min() < 0 or held.max() >= examples):
            raise ParameterError(
                "population",
                f"names example {max(held.max(), held.min(), key=abs)}; the task has {examples} training examples",
            )

    def sizes_of(self, clients: Int[Array, "C"]) -> Int[Array, "C"]:
        """The number of examples that each of ``clients`` holds, [C]."""
        offsets = jnp.asarray(self.offsets)
        return offsets[clients + 1] - offsets[clients]

    def sample(self, key: Key[Array, ""], clients: Int[Array, "C"], shape: tuple[int, ...]) -> Int[Array, "C ..."]:
        """Example indices drawn uniformly with replacement from each client's own examples, int32 [C, …shape].

        A client's draw depends only on the key and the client, not on its place in the cohort.
        """
        indices, offsets = jnp.asarray(self.indices), jnp.asarray(self.offsets)

        def draw(client: Int[Array, ""]) -> Int[Array, "..."]:
            first, end = offsets[client], offsets[client + 1]
            own = drawn(lambda key, shape: jax.random.randint(key, shape, first, end), fold_in(key, client), shape)
            return indices[own]

        return jax.vmap(draw)(clients)


def draw_own(
    key: Key[Array, ""], client: Int[Array, ""], examples: Int[Array, ""], shape: tuple[int, ...]
) -> Int[Array, "..."]:
    """A client's draw among its own examples, numbered from 0: what :meth:`Population.sample` draws for it."""
    return drawn(lambda key, shape: jax.random.randint(key, shape, 0, examples), fold_in(key, client), shape)


def as_population(given: Any) -> Any:
    """A population that a user gives: the value itself, or the pair that ``fed.by_column`` returns.

    Raises:
      ParameterError: it is neither.
    """
    # The second member of the pair is the names of the clients.
    population = given[0] if isinstance(given, tuple) and len(given) == 2 else given
    of_kind("population", population, (Population, AnyPopulation), "a population, such as fed.dirichlet returns")
    return population
