"""Partitions by name: how training examples are assigned to clients, as in ``--partition`` and ``Experiment``.

A partition is a factory ``name(train, clients, seed, *, options)``: ``train`` is the task's training data, a pytree of
arrays whose first axis runs over the examples, with an entry ``label`` if there are labels. It returns a population.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import jax
import numpy as np

from hiso_jax import fed
from hiso_jax.checks import ParameterError
from hiso_jax.choices import AnyFactory, Kind, Listed
from hiso_jax.fed.population import AnyPopulation

# The entry of text training data with the names of the clients.
CLIENT = "client"
CLIENT_EXAMPLES = (16, 256)
Sizes = Annotated[tuple[int, ...], Listed(int, "MIN,MAX")]


def by_label(factory: AnyFactory) -> AnyFactory:
    """Declare that a partition reads labels, so that a task without labels is refused before it is loaded."""
    vars(factory)["by_label"] = True
    return factory


def _count(train: Any) -> int:
    return len(jax.tree.leaves(train)[0])


def _labels(train: Any) -> Any:
    labels = train.get("label") if isinstance(train, Mapping) else None
    if labels is None:
        raise ParameterError("partition", "must be iid, or by-column, for a task without labels")
    return labels


def _virtual(train: Any, clients: int, virtual: bool, sizes: tuple[int, ...]) -> bool:
    """Whether clients draw from the shared pool: by request, or because they outnumber the examples.

    Raises:
      ParameterError: the sizes are out of range, or sizes are given for clients that are not virtual.
    """
    if len(sizes) != 2 or not 1 <= sizes[0] <= sizes[1] < 2**31:
        given = ",".join(map(str, sizes))
        raise ParameterError("client_examples", f"must be two numbers 1 ≤ fewest ≤ most < 2^31, got {given}")
    is_virtual = virtual or clients > _count(train)
    if tuple(sizes) != CLIENT_EXAMPLES and not is_virtual:
        raise ParameterError(
            "client_examples",
            f"is read by virtual clients; it would have no effect on {clients} clients that share "
            f"{_count(train)} examples",
        )
    return is_virtual


@by_label
def dirichlet(
    train: Any,
    clients: int,
    seed: int,
    *,
    alpha: float = 0.5,
    virtual: bool = False,
    client_examples: Sizes = CLIENT_EXAMPLES,
) -> AnyPopulation:
    """Each label's examples split among clients in Dirichlet proportions (Hsu et al., arXiv 1909.06335).

    Args:
      train: the task's training data, with labels.
      clients: number of clients, N.
      seed: the seed of the proportions.
      alpha: concentration of the Dirichlet partition; smaller means more heterogeneous clients.
      virtual: any number of clients that exist only as a key and draw their examples from the shared pool, each by its
        own mixture of labels; always so if there are more clients than examples.
      client_examples: fewest and most examples of a virtual client, log-uniform in between.

    Raises:
      ParameterError: the task has no labels; N, α or the sizes are out of range; or sizes are given without virtual
        clients.
    """
    if _virtual(train, clients, virtual, client_examples):
        fewest, most = client_examples
        return fed.virtual(_labels(train), clients, alpha=alpha, sizes=(fewest, most), seed=seed)
    return fed.dirichlet(_labels(train), clients, alpha=alpha, seed=seed)


@by_label
def dirichlet_balanced(train: Any, clients: int, seed: int, *, alpha: float = 0.5) -> AnyPopulation:
    """The Dirichlet partition with clients of equal size, as in the language-model experiments of DeComFL and HiSo.

    Args:
      train: the task's training data, with labels.
      clients: number of clients, N.
      seed: the seed of the proportions.
      alpha: concentration of the Dirichlet partition; smaller means more heterogeneous clients.

    Raises:
      ParameterError: the task has no labels, or N or α is out of range.
    """
    return fed.dirichlet_balanced(_labels(train), clients, alpha=alpha, seed=seed)


def iid(
    train: Any, clients: int, seed: int, *, virtual: bool = False, client_examples: Sizes = CLIENT_EXAMPLES
) -> AnyPopulation:
    """Examples assigned at random, in shares that differ by at most one.

    Args:
      train: the task's training data.
      clients: number of clients, N.
      seed: the seed of the shuffle.
      virtual: any number of clients that exist only as a key and draw their examples from the shared pool; always so if
        there are more clients than examples.
      client_examples: fewest and most examples of a virtual client, log-uniform in between.

    Raises:
      ParameterError: N or the sizes are out of range, or sizes are given without virtual clients.
    """
    if _virtual(train, clients, virtual, client_examples):
        labels = train.get("label") if isinstance(train, Mapping) else None
        fewest, most = client_examples
        pool = np.zeros(_count(train), np.int32) if labels is None else labels
        return fed.virtual(pool, clients, sizes=(fewest, most), seed=seed)
    return fed.iid(_count(train), clients, seed=seed)


@by_label
def shards(train: Any, clients: int, seed: int, *, shards_per_client: int = 2) -> AnyPopulation:
    """Examples sorted by label, cut into equal shards, assigned at random (McMahan et al., arXiv 1602.05629).

    Args:
      train: the task's training data, with labels.
      clients: number of clients, N.
      seed: the seed of the assignment.
      shards_per_client: label shards assigned to each client.

    Raises:
      ParameterError: the task has no labels, or N or the number of shards is out of range.
    """
    return fed.shards(_labels(train), clients, shards_per_client=shards_per_client, seed=seed)


def by_column(train: Any, *, column: str | None = None) -> AnyPopulation:
    """Natural clients: each training row belongs to the client that a column of the text data names.

    Args:
      train: the training data of a text task.
      column: column of the text data that names the client of each training row.

    Raises:
      ParameterError: the training data have no column that names the clients.
    """
    if not isinstance(train, Mapping) or CLIENT not in train:
        given = "a column that names the clients" if column is None else f"text data; {column} is no column of the task"
        raise ParameterError("column", f"must be given with partition by-column, and name {given}")
    return fed.by_column(train[CLIENT])[0]


PARTITIONS = Kind(
    "partition",
    {
        "dirichlet": dirichlet,
        "dirichlet-balanced": dirichlet_balanced,
        "iid": iid,
        "shards": shards,
        "by-column": by_column,
    },
    ("train", "clients", "seed"),
    "Population",
    is_valid=lambda made: isinstance(made, AnyPopulation),
)
