"""Who holds which data: a task's examples dealt to clients, as offsets into one permuted index array."""

import heapq
import itertools
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key


class Clients(Protocol):
    """What a run needs to know of a population: :class:`Population` and ``VirtualPopulation`` have it."""

    @property
    def num_clients(self) -> int:
        """N, the number of clients."""

    def check(self, examples: int) -> None:
        """Raise a ValueError if it cannot belong to ``examples`` training examples."""

    def sizes_of(self, clients: Int[Array, "C"]) -> Int[Array, "C"]:
        """How many examples each of ``clients`` holds."""

    def sample(self, key: Key[Array, ""], clients: Int[Array, "C"], shape: tuple[int, ...]) -> Int[Array, "C ..."]:
        """Example numbers drawn uniformly with replacement from each client's own, int32 [C, *shape]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Population:
    """A partition of a task's training examples among clients.

    Attributes:
      indices: example numbers, grouped by client, int32 [examples].
      offsets: client i holds ``indices[offsets[i]:offsets[i + 1]]``, int32 [clients + 1].
    """

    indices: Any
    offsets: Any

    @property
    def num_clients(self) -> int:
        """N, the number of clients."""
        return self.offsets.shape[0] - 1

    @property
    def sizes(self) -> Int[Array, "N"]:
        """How many examples each client holds."""
        return self.offsets[1:] - self.offsets[:-1]

    def check(self, examples: int) -> None:
        """Refuse a population of other data than ``examples`` training examples, or one that is none.

        Raises:
          ValueError: it names an example beyond them, its offsets do not run from 0 to the number of indices, or a
            client holds no example.
        """
        held, offsets = np.asarray(self.indices), np.asarray(self.offsets)
        for name, array in (("indices", held), ("offsets", offsets)):
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise ValueError(f"{name} must be one-dimensional integers, got {array.dtype} of shape {array.shape}")
        if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(held):
            ends = f"{offsets[0]} and {offsets[-1]}" if len(offsets) else "none"
            raise ValueError(
                f"offsets must begin at 0 and end at the number of indices, {len(held)}, with an entry more than there "
                f"are clients; got {ends}"
            )
        sizes = np.diff(offsets.astype(np.int64))
        if (sizes < 1).any():
            client = int(np.argmax(sizes < 1))
            what = "no example" if sizes[client] == 0 else "offsets that decrease"
            raise ValueError(f"offsets must give every client at least one example; client {client} has {what}")
        if held.size and (held.min() < 0 or held.max() >= examples):
            raise ValueError(
                f"population names example {max(held.max(), held.min(), key=abs)}; "
                f"the task has {examples} training examples"
            )

    def sizes_of(self, clients: Int[Array, "C"]) -> Int[Array, "C"]:
        """How many examples each of ``clients`` holds."""
        offsets = jnp.asarray(self.offsets)
        return offsets[clients + 1] - offsets[clients]

    def sample(self, key: Key[Array, ""], clients: Int[Array, "C"], shape: tuple[int, ...]) -> Int[Array, "C ..."]:
        """Example numbers drawn uniformly with replacement from each client's own, int32 [C, *shape].

        A client's draw depends on the key and the client alone, not on its place in the cohort.
        """
        indices, offsets = jnp.asarray(self.indices), jnp.asarray(self.offsets)

        def draw(client: Int[Array, ""]) -> Int[Array, "..."]:
            own = jax.random.randint(jax.random.fold_in(key, client), shape, offsets[client], offsets[client + 1])
            return indices[own]

        return jax.vmap(draw)(clients)


def _check(examples: int, clients: int) -> None:
    if clients < 1:
        raise ValueError(f"clients must be at least 1, got {clients}")
    if clients > examples:
        raise ValueError(
            f"clients must be at most the number of training examples, {examples}, "
            f"so that none is left without data; got {clients}"
        )


def _from_owners(owners: Int[np.ndarray, "n"], clients: int) -> Population:
    """The population in which example i belongs to client ``owners[i]``; nothing is lost by construction.

    An empty client takes one example from the client that holds the most.
    """
    counts = np.bincount(owners, minlength=clients)
    empty = np.flatnonzero(counts == 0)
    if empty.size:
        order, ends = np.argsort(owners, kind="stable"), np.cumsum(counts)
        donors = np.flatnonzero(counts > 1)
        richest = list(zip(-counts[donors], donors, strict=True))
        heapq.heapify(richest)
        for client in empty:
            negative, donor = richest[0]
            ends[donor] -= 1
            owners[order[ends[donor]]] = client
            heapq.heapreplace(richest, (negative + 1, donor))
        counts = np.bincount(owners, minlength=clients)
    indices = np.argsort(owners, kind="stable").astype(np.int32)
    return Population(indices, np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))


def iid(examples: int, clients: int, *, seed: int = 0) -> Population:
    """Examples dealt at random, in shares that differ by at most one.

    Args:
      examples: the number of training examples n.
      clients: N ≤ n.
      seed: of the shuffle.

    Raises:
      ValueError: N < 1 or N > n.
    """
    _check(examples, clients)
    owners = np.empty(examples, np.int64)
    owners[np.random.default_rng(seed).permutation(examples)] = np.arange(examples) % clients
    return _from_owners(owners, clients)


def dirichlet(labels: Int[np.ndarray, "n"], clients: int, *, alpha: float, seed: int = 0) -> Population:
    """Each label's examples split among clients in proportions drawn from Dirichlet(α) (Hsu et al., arXiv 1909.06335).

    Args:
      labels: the label of every training example.
      clients: N ≤ n.
      alpha: concentration α > 0; small means clients that hold few labels, large approaches i.i.d.
      seed: of the proportions and the shuffle.

    Raises:
      ValueError: N < 1, N > n, or α not positive and finite.
    """
    _check(len(labels), clients)
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha must be a positive finite number, got {alpha}")
    rng = np.random.default_rng(seed)
    owners = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(members)
        owners[members] = np.searchsorted(cuts, np.arange(len(members)), side="right")
    return _from_owners(owners, clients)


def dirichlet_balanced(labels: Int[np.ndarray, "n"], clients: int, *, alpha: float, seed: int = 0) -> Population:
    """:func:`dirichlet`, then rebalanced to clients of ⌊n / N⌋ examples each; the remainder is dropped.

    What clients hold above their share goes, at random, to those below it. The partition of the language-model
    experiments of DeComFL and HiSo (arXiv 2405.15861, 2506.02370).

    Args:
      labels: the label of every training example.
      clients: N ≤ n.
      alpha: concentration α > 0.
      seed: of the proportions and the shuffle.

    Raises:
      ValueError: N < 1, N > n, or α not positive and finite.
    """
    skewed = dirichlet(labels, clients, alpha=alpha, seed=seed)
    share = len(labels) // clients
    rng = np.random.default_rng((seed, 1))
    held = [rng.permutation(skewed.indices[a:b]) for a, b in itertools.pairwise(skewed.offsets)]
    spare = rng.permutation(np.concatenate([own[share:] for own in held]))
    missing = np.cumsum([0, *(max(share - len(own), 0) for own in held)])
    filled = [
        np.concatenate([own[:share], spare[a:b]]) for own, (a, b) in zip(held, itertools.pairwise(missing), strict=True)
    ]
    return Population(np.concatenate(filled).astype(np.int32), (np.arange(clients + 1) * share).astype(np.int32))


def shards(labels: Int[np.ndarray, "n"], clients: int, *, shards_per_client: int = 2, seed: int = 0) -> Population:
    """Examples sorted by label, cut into equal shards and dealt at random (McMahan et al., arXiv 1602.05629).

    Args:
      labels: the label of every training example.
      clients: N ≤ n.
      shards_per_client: how many shards each client is dealt, and so about how many labels it sees.
      seed: of the deal.

    Raises:
      ValueError: N < 1, N > n, or ``shards_per_client`` < 1.
    """
    _check(len(labels), clients)
    if shards_per_client < 1:
        raise ValueError(f"shards_per_client must be at least 1, got {shards_per_client}")
    rng = np.random.default_rng(seed)
    count = clients * shards_per_client
    shuffled = rng.permutation(len(labels))
    by_label = shuffled[np.argsort(np.asarray(labels)[shuffled], kind="stable")]
    deal = rng.permutation(count) % clients
    owners = np.empty(len(labels), np.int64)
    owners[by_label] = deal[np.arange(len(labels)) * count // len(labels)]
    return _from_owners(owners, clients)
