"""The interface of a task, and helpers for its optional members."""

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree, Shaped

from hiso_jax.checks import ParameterError, first_line, function
from hiso_jax.factored import PerturbedAs
from hiso_jax.renamed import refuse_renamed

logger = logging.getLogger("hiso_jax")


@runtime_checkable
class Task(Protocol):
    """A model, its loss, its metrics and its data. Any object with these members is a task.

    ``train`` and ``test`` are pytrees of arrays that share their leading axis, the examples; a batch is the same
    pytree with B examples.

    A task may also have these optional members:

    - ``frozen``: a pytree of arrays that the model needs but that are not trained. It is then the third argument of
      ``loss`` and ``metrics``.
    - ``summarise(outputs)``: reduces the metrics of all test examples, {name: array [n, ...]}, to the reported
      {name: number}. Without it, means are reported.
    - a parameter ``key`` of ``loss``, ``key=None``: a loss that samples gets a key of JAX in training, one for all
      evaluations of a round. Its bits must not depend on the places of examples in a batch.
    - ``samples(outputs)``: a list of dicts of text that shows what the model does on some test examples; ``outputs``
      as in ``summarise``.
    - ``mean_metrics``: the names of the metrics that ``summarise`` reports as means over examples. Clients that
      evaluate for a server over a network send the sums of these.
    - ``name``: the task's name in reports.
    - ``metric``: the name of the metric that counts. Higher is better, except for ``loss``. Without it, ``loss``
      counts, or else the first metric.
    - ``target``: the value of that metric at which methods are compared.
    - ``hold_out(examples, seed=...)``: the same task with ``examples`` random training examples as its test split, for
      tuning. Without it, both splits are cut along their leading axis.
    - ``layout(name, shape, shards)``: the axis along which a parameter is split over ``shards`` devices; None does not
      split it. Without it, the longest axis that ``shards`` divides is split.
    - ``is_differentiable``: whether the loss has a useful gradient; by default it has. Methods whose clients take
      gradients refuse a task without.
    - ``perturbed_as(name)``: how the model reads a parameter perturbed along a direction
      (:data:`hiso_jax.factored.PerturbedAs`), so that directions of low rank need no perturbed copy of it. Without it,
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
      name: its name among the reported metrics.
      higher_is_better: whether a higher value is better; else a lower value is.
    """

    name: str
    higher_is_better: bool = True

    @property
    def sign(self) -> float:
        """The factor for its values after which higher is better."""
        return 1.0 if self.higher_is_better else -1.0

    @property
    def worst(self) -> float:
        """The value that a failed run counts as."""
        return -self.sign * math.inf


@cache
def _guess(names: tuple[str, ...]) -> None:
    """Warn, once, that the first metric counts because the task names none."""
    logger.warning(
        "the task does not say by its metric which of %s counts; %s is taken to, higher being better",
        ", ".join(names),
        names[0],
    )


def metric_of(task: Task, reported: Iterable[str]) -> Metric:
    """The metric that counts among the ``reported`` metrics.

    Raises:
      ValueError: the task names a metric that is not reported.
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
    """A task with other splits; all other members are the task's. See :func:`hold_out`."""

    task: Any
    train: PyTree
    test: PyTree

    def __getattr__(self, name: str) -> Any:
        """Read every member that is not a split from the task."""
        # Copying and unpickling read attributes before ``task`` is set.
        if name == "task" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.task, name)


def hold_out(task: Any, examples: int, *, seed: int = 0) -> Any:
    """The same task with ``examples`` random training examples as its test split, for tuning.

    Raises:
      ValueError: ``examples`` does not leave at least one example in each split.
    """
    if hasattr(task, "hold_out"):
        return task.hold_out(examples, seed=seed)
    total = examples_of(task.train)
    if not 0 < examples < total:
        raise ParameterError("examples", f"must be at least 1 and below {total}, got {examples}")
    held, kept = np.split(np.random.default_rng(seed).permutation(total), [examples])
    return HeldOut(task, *(jax.tree.map(lambda a, rows=rows: a[rows], task.train) for rows in (kept, held)))


Value = Callable[[Mapping[str, Array], Any], Float[Array, "B"]]
"""(metrics of a batch by name, batch) → a value of each example."""


def of_metric(name: str) -> Value:
    """The task's metric ``name``, maximised.

    Raises:
      ParameterError: at the call, the task has no such metric.
    """

    def value(metrics: Mapping[str, Array], batch: Any) -> Float[Array, "B"]:
        if name not in metrics:
            raise ParameterError(
                "objective", f"must be loss or one of the task's metrics, {', '.join(metrics)}; got {name}"
            )
        return metrics[name]

    return value


@dataclass(frozen=True)
class Maximised:
    """A task whose loss is the negative of a value of each example; all other members are the task's.

    Attributes:
      task: the task.
      value: (metrics of a batch by name, batch) → [B].
      is_on_host: whether the value is computed by Python on the host, for which every evaluation waits.
    """

    task: Any
    value: Value
    is_on_host: bool = False
    # A value may have steps, so that nothing may differentiate it.
    is_differentiable = False

    @property
    def train(self) -> PyTree:
        """The task's training examples."""
        return self.task.train

    @property
    def test(self) -> PyTree:
        """The task's test examples."""
        return self.task.test

    def init(self, key: Key[Array, ""]) -> PyTree:
        """The task's initial parameters."""
        return self.task.init(key)

    def metrics(self, params: PyTree, batch: Any, *frozen: PyTree) -> Any:
        """The task's metrics."""
        return self.task.metrics(params, batch, *frozen)

    def loss(self, params: PyTree, batch: Any, *frozen: PyTree, key: Key[Array, ""] | None = None) -> Float[Array, "B"]:
        """The negative of each example's value; a task whose metrics sample gets ``key``."""
        keyed = {"key": key} if key is not None and takes_key(self.task.metrics) else {}
        return -jnp.asarray(self.value(self.task.metrics(params, batch, *frozen, **keyed), batch)).astype(jnp.float32)

    def hold_out(self, examples: int, *, seed: int = 0) -> "Maximised":
        """The same objective on a part of the training examples."""
        return Maximised(hold_out(self.task, examples, seed=seed), self.value, self.is_on_host)

    def __getattr__(self, name: str) -> Any:
        """Read every other member from the task."""
        # Copying and unpickling read attributes before ``task`` is set.
        if name == "task" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.task, name)


@runtime_checkable
class ValueOfTask(Protocol):
    """A value that is made for a task, such as a reward that decodes its tokens.

    Attributes:
      is_on_host: whether Python on the host computes it.
    """

    is_on_host: bool

    def of_task(self, task: Any) -> Value:
        """The value for examples of ``task``.

        Raises:
          ParameterError: the task does not have what the value reads.
        """
        ...


def maximise(task: Any, value: Value | ValueOfTask | str) -> Any:
    """The task with another objective: it maximises a value of each example, which may have steps.

    Along directions nothing is differentiated, so a share of correct answers, F1, exact match or a reward can be
    trained themselves. Take a larger μ than for a loss, 0.1 for small networks: where a value does not change between
    two evaluations, the scalar is zero. Reports then have the share of such scalars.

    Args:
      task: the task, whose metrics have a number for each example.
      value: a metric's name; or ``(metrics, batch) → [B]``; or an object that makes such a function for a task, as
        :func:`hiso_jax.tasks.text.text_reward` returns it.

    Raises:
      ParameterError: the task has no such metric, or the value is not a number for each example.

    Example:
      >>> from hiso_jax import fed, tasks
      >>> digits = tasks.digits()
      >>> task = fed.maximise(digits, digits.metric)
    """
    if isinstance(value, ValueOfTask):
        made = Maximised(task, value.of_task(task), value.is_on_host)
    else:
        value = of_metric(value) if isinstance(value, str) else value
        function("objective", value, "metrics, batch")
        made = Maximised(task, value)
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *a.shape[1:]), a.dtype), task.train)
    params = jax.eval_shape(task.init, jax.random.key(0))
    # Frozen parameters are arguments, because a model cannot index constants of NumPy by traced integers.
    frozen = frozen_of(task)
    found = jax.eval_shape(made.loss, params, batch, *([] if frozen is None else [frozen]))
    if found.shape != (2,):
        raise ParameterError(
            "objective", f"must be a number for each example, of shape (2,) for two of them; got {found.shape}"
        )
    return made


def examples_of(data: PyTree) -> int:
    """The number of examples in a split."""
    return jax.tree.leaves(data)[0].shape[0]


def frozen_of(task: Task) -> PyTree | None:
    """The task's frozen parameters, which its model needs beside the trained parameters, or None."""
    return getattr(task, "frozen", None)


def perturbed_as_of(task: Any) -> PerturbedAs | None:
    """The task's ``perturbed_as``: how its model reads perturbed parameters, or None."""
    if hasattr(task, "moved_as"):
        refuse_renamed({"moved_as": task.moved_as})
    return getattr(task, "perturbed_as", None)


def bind(function: Callable[..., Any], frozen: PyTree | None) -> Callable[[PyTree, Any], Any]:
    """A task's ``loss`` or ``metrics`` as a function of trained parameters and batch."""
    return function if frozen is None else lambda params, batch: function(params, batch, frozen)


def takes_key(function: Callable[..., Any]) -> bool:
    """Whether a task's ``loss`` or ``metrics`` samples: it then has a parameter ``key``, for a key of JAX."""
    return "key" in inspect.signature(function).parameters


def at_precision(function: Callable[..., Any], precision: str) -> Callable[..., Any]:
    """A task's ``loss`` or ``metrics`` with float32 products at JAX's ``default_matmul_precision`` of ``precision``."""
    if precision == "default":
        return function

    @wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return function(*arguments, **named)

    return run


def mean_metrics(task: Any, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a task's metrics that are reported as means over examples, in the order of their names."""
    names = metrics if getattr(task, "summarise", None) is None else getattr(task, "mean_metrics", ())
    return {name: metrics[name] for name in sorted(names)}


def summarise(task: Task, outputs: Mapping[str, Shaped[np.ndarray, "n ..."]]) -> dict[str, float]:
    """Reduce the metrics of all test examples to the reported metrics.

    Raises:
      ValueError: the task's own ``summarise`` does not return a number for each name.
    """
    reduce = getattr(task, "summarise", None)
    if reduce is None:
        return {name: float(np.mean(values, dtype=np.float64)) for name, values in outputs.items()}
    try:
        return {name: float(value) for name, value in reduce(outputs).items()}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ParameterError("summarise", f"must return one number for each name; it fails to ({reason})") from error
