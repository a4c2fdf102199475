"""What the federation needs to know of a task, and no more."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, Key, PyTree, Shaped

from hiso_jax.checks import ParameterError, first_line
from hiso_jax.factored import PerturbedAs
from hiso_jax.renamed import refuse_renamed

logger = logging.getLogger("hiso_jax")


@runtime_checkable
class Task(Protocol):
    """A model, its loss, its metrics and its data. Any object with these members will do.

    ``train`` and ``test`` are pytrees of arrays that share their leading axis, the examples; a batch is the same
    pytree with B examples.

    The others are optional. ``frozen``, a pytree of arrays, holds what the model needs and nobody trains: it then is
    the third argument of ``loss`` and ``metrics``. ``summarise(outputs)`` turns what ``metrics`` gave for every test
    example, {name: array [n, ...]}, into the reported {name: number}; without it they are means. ``name`` is what
    reports call the task. ``metric`` names the metric that counts, higher being better but for one called ``loss``;
    without it that is ``loss``, or the first. ``target`` is the value of it at which methods are compared.
    ``hold_out(examples, seed=...)`` is the same task with so many random training examples for its test split, for
    tuning; without it both splits are cut along their leading axis. ``layout(name, shape, shards)`` says along which
    axis a parameter is split over so many devices, None for not at all; without it that is the longest that divides.
    ``perturbed_as(name)`` says how the model reads a parameter perturbed along a direction
    (:data:`hiso_jax.factored.PerturbedAs`), so that directions of low rank need no perturbed copy of it; without it
    perturbed parameters are arrays.
    """

    @property
    def train(self) -> PyTree:
        """The training examples, partitioned among the clients."""

    @property
    def test(self) -> PyTree:
        """The examples on which ``metrics`` are reported."""

    def init(self, key: Key[Array, ""]) -> PyTree:
        """The initial parameters: a pytree of floating-point arrays."""

    def loss(self, params: PyTree, batch: Any) -> Float[Array, "B"]:
        """The loss of each example."""

    def metrics(self, params: PyTree, batch: Any) -> Mapping[str, Shaped[Array, "B ..."]]:
        """Named metrics of each example; they are reported as means over ``test`` unless ``summarise`` says how."""


class Metric(NamedTuple):
    """The metric that counts.

    Attributes:
      name: among those that are reported.
      higher_is_better: or lower.
    """

    name: str
    higher_is_better: bool = True

    @property
    def sign(self) -> float:
        """Times a value of it, higher is better."""
        return 1.0 if self.higher_is_better else -1.0

    @property
    def worst(self) -> float:
        """What a run that came to nothing counts as."""
        return -self.sign * math.inf


@cache
def _guess(names: tuple[str, ...]) -> None:
    """Say once what is taken for want of a word from the task."""
    logger.warning(
        "the task does not say by its metric which of %s counts; %s is taken to, higher being better",
        ", ".join(names),
        names[0],
    )


def metric_of(task: Task, reported: Iterable[str]) -> Metric:
    """The metric that counts, of those that are ``reported``.

    Raises:
      ValueError: the task names one that is not reported.
    """
    names, name = list(reported), getattr(task, "metric", None)
    if name is None and "loss" not in names and len(names) > 1:
        _guess(tuple(names))
    name = name or ("loss" if "loss" in names else names[0])
    if name not in names:
        raise ParameterError("metric", f"must be one of the task's metrics, {', '.join(names)}; got {name}")
    return Metric(name, name != "loss")


@dataclass(frozen=True)
class HeldOut:
    """A task with other splits, all else its own; see :func:`hold_out`."""

    task: Any
    train: PyTree
    test: PyTree

    def __getattr__(self, name: str) -> Any:
        """What is not a split is the task's."""
        # What copies or unpickles asks before there is a task.
        if name == "task" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.task, name)


def hold_out(task: Any, examples: int, *, seed: int = 0) -> Any:
    """The same task with ``examples`` random training examples for its test split: for tuning.

    Raises:
      ValueError: ``examples`` does not leave both splits an example.
    """
    if hasattr(task, "hold_out"):
        return task.hold_out(examples, seed=seed)
    total = examples_of(task.train)
    if not 0 < examples < total:
        raise ParameterError("examples", f"must be at least 1 and below {total}, got {examples}")
    held, kept = np.split(np.random.default_rng(seed).permutation(total), [examples])
    return HeldOut(task, *(jax.tree.map(lambda a, rows=rows: a[rows], task.train) for rows in (kept, held)))


def examples_of(data: PyTree) -> int:
    """How many examples a split has."""
    return jax.tree.leaves(data)[0].shape[0]


def frozen_of(task: Task) -> PyTree | None:
    """What the task's model needs beside its trained parameters, or None."""
    return getattr(task, "frozen", None)


def perturbed_as_of(task: Any) -> PerturbedAs | None:
    """How the task's model reads moved parameters, or None."""
    if hasattr(task, "moved_as"):
        refuse_renamed({"moved_as": task.moved_as})
    return getattr(task, "perturbed_as", None)


def bind(function: Callable[..., Any], frozen: PyTree | None) -> Callable[[PyTree, Any], Any]:
    """A task's ``loss`` or ``metrics`` as a function of trained parameters and batch."""
    return function if frozen is None else lambda params, batch: function(params, batch, frozen)


def at_precision(function: Callable[..., Any], precision: str) -> Callable[..., Any]:
    """A task's ``loss`` or ``metrics``, its products of float32 rounded as JAX's ``default_matmul_precision`` says."""
    if precision == "default":
        return function

    def run(*arguments: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return function(*arguments)

    return run


def summarise(task: Task, outputs: Mapping[str, Shaped[np.ndarray, "n ..."]]) -> dict[str, float]:
    """The reported metrics from those of every test example.

    Raises:
      ValueError: the task's own ``summarise`` returns something else than numbers by name.
    """
    reduce = getattr(task, "summarise", None)
    if reduce is None:
        return {name: float(np.mean(values, dtype=np.float64)) for name, values in outputs.items()}
    try:
        return {name: float(value) for name, value in reduce(outputs).items()}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ParameterError("summarise", f"must return one number for each name; it fails to ({reason})") from error
