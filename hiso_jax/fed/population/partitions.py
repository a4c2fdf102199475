"""Partitions of a task's examples among clients: i.i.d., by Dirichlet mixtures of labels, by label shards."""

import heapq
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from hiso_jax.checks import ParameterError, integer, positive
from hiso_jax.fed.population.columns import KINDS, column_of
from hiso_jax.fed.population.population import Population


def _check(examples: int, clients: int, seed: Any = 0) -> None:
    integer("examples", examples, 1)
    integer("clients", clients, 1)
    integer("seed", seed, 0)
    if clients > examples:
        raise ParameterError(
            "clients",
            f"must be at most the number of training examples, {examples}, "
            f"so that none is left without data; got {clients}",
        )


def _from_owners(owners: Int[np.ndarray, "n"], clients: int) -> Population:
    """The population in which example i belongs to client ``owners[i]``; every example is kept by construction.

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
    """Examples assigned at random, in shares whose sizes differ by at most one.

    Args:
      examples: the number of training examples n.
      clients: number of clients N ≤ n.
      seed: seed of the shuffle.

    Raises:
      ValueError: N < 1 or N > n.
    """
    _check(examples, clients, seed)
    owners = np.empty(examples, np.int64)
    owners[np.random.default_rng(seed).permutation(examples)] = np.arange(examples) % clients
    return _from_owners(owners, clients)


def dirichlet(labels: Int[np.ndarray, "n"], clients: int, *, alpha: float, seed: int = 0) -> Population:
    """Each label's examples split among clients in proportions drawn from Dirichlet(α) (Hsu et al., arXiv 1909.06335).

    Args:
      labels: the label of every training example.
      clients: number of clients N ≤ n.
      alpha: concentration α > 0; with a small α clients hold few labels, a large α approaches i.i.d.
      seed: seed of the proportions and the shuffle.

    Raises:
      ValueError: ``labels`` is not one value for each example, N < 1, N > n, or α is not positive and finite.
    """
    labels = column_of("labels", labels, *KINDS)
    _check(len(labels), clients, seed)
    positive("alpha", alpha)
    rng = np.random.default_rng(seed)
    owners = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(members)
        owners[members] = np.searchsorted(cuts, np.arange(len(members)), side="right")
    return _from_owners(owners, clients)


def dirichlet_balanced(labels: Int[np.ndarray, "n"], clients: int, *, alpha: float, seed: int = 0) -> Population:
    """:func:`dirichlet`, then rebalanced to clients of ⌊n / N⌋ examples each; the remainder is dropped.

    Examples above a client's share go, at random, to clients below their share. This is the partition of the
    language-model experiments of DeComFL and HiSo (arXiv 2405.15861, 2506.02370).

    Args:
      labels: the label of every training example.
      clients: number of clients N ≤ n.
      alpha: concentration α > 0.
      seed: seed of the proportions and the shuffle.

    Raises:
      ValueError: ``labels`` is not one value for each example, N < 1, N > n, or α is not positive and finite.
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
    """Examples sorted by label and cut into equal shards, assigned at random (McMahan et al., arXiv 1602.05629).

    Args:
      labels: the label of every training example.
      clients: number of clients N ≤ n.
      shards_per_client: shards of each client, about the number of labels that it holds.
      seed: seed of the assignment.

    Raises:
      ValueError: ``labels`` is not one value for each example, N < 1, N > n, or ``shards_per_client`` < 1.
    """
    labels = column_of("labels", labels, *KINDS)
    _check(len(labels), clients, seed)
    integer("shards_per_client", shards_per_client, 1)
    rng = np.random.default_rng(seed)
    count = clients * shards_per_client
    shuffled = rng.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    deal = rng.permutation(count) % clients
    owners = np.empty(len(labels), np.int64)
    owners[by_label] = deal[np.arange(len(labels)) * count // len(labels)]
    return _from_owners(owners, clients)


def by_column(owners: Sequence[Any]) -> tuple[Population, list[Any]]:
    """Examples assigned to the clients that a column of the data names: users, hospitals, devices.

    Args:
      owners: the client of every training example, integers or text, [n].

    Returns:
      (population, names): client i is ``names[i]``; the names are sorted, text alphabetically.

    Raises:
      ValueError: there is no example, or the names are not all of one kind.

    Example:
      >>> from hiso_jax import fed
      >>> population, names = fed.by_column(["ann", "bo", "ann"])
      >>> names, population.sizes.tolist()
      (['ann', 'bo'], [2, 1])
    """
    column = column_of("owners", owners, "integers", "text", "truth values")
    names, numbers = np.unique(column, return_inverse=True)
    return _from_owners(numbers.reshape(-1), len(names)), names.tolist()
