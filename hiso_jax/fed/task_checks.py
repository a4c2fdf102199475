"""Checks that a task can be run: its data are arrays of finite numbers, and its loss is one number for each example.

Without these checks an error in the task would show only as a run that makes no progress: a client whose loss is not
finite is left out, round after round.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from hiso_jax.checks import ParameterError, arrays, is_real
from hiso_jax.fed.task import Task, frozen_of
from hiso_jax.zo import check_generator, in_float32

BLOCK = 2**24
HOW = 'make it a pytree of NumPy or JAX arrays that share their leading axis, {"input": …, "label": …} say'


def check_task(task: Task) -> np.dtype:
    """Refuse a task whose data or loss no run can use, without running its functions.

    Returns:
      The dtype of the loss: the dtype before its last rounding, if that is available.

    Raises:
      ValueError: JAX's generator is unsafe_rbg; a member is missing or of another kind than in
        :class:`hiso_jax.fed.Task`; a split is not a pytree of arrays of one length, or holds text or a number that is
        not finite (the message names the entry and the example); or the loss is not one number for each example. The
        outputs of ``metrics`` are checked when an evaluation is compiled.
    """
    check_given(task)
    check_generator(jax.random.key(0))
    for name in ("train", "test", "init", "loss", "metrics"):
        if not hasattr(task, name):
            raise ParameterError(
                "task", f"must have init, loss, metrics, train and test, see fed.Task; it lacks {name}"
            )
    for name in ("init", "loss", "metrics", "summarise", "hold_out", "layout", "perturbed_as"):
        member = getattr(task, name, None)
        if member is not None and not callable(member):
            raise ParameterError(name, f"of a task must be a function, got a {type(member).__name__}")
    target, metric = getattr(task, "target", None), getattr(task, "metric", None)
    if target is not None and not (is_real(target) and np.isfinite(target)):
        raise ParameterError("target", f"of a task must be a number or None, got {target!r}")
    if metric is not None and not isinstance(metric, str):
        raise ParameterError("metric", f"of a task must be the name of one of its metrics or None, got {metric!r}")
    for split in ("train", "test"):
        check_examples(split, getattr(task, split))
    _check_alike(task.train, task.test)
    return _check_loss(task)


def check_given(task: Any) -> None:
    """Refuse a name, a factory or a class in the place of a task.

    Raises:
      ParameterError: it is none.
    """
    if isinstance(task, type | str) or (callable(task) and not hasattr(task, "init")):
        name = task if isinstance(task, str) else getattr(task, "__name__", type(task).__name__)
        hint = "hiso_jax.Experiment takes names" if isinstance(task, str) else f"{name}(…) with parentheses?"
        raise ParameterError(
            "task", f"must be a task, an object with init, loss, metrics, train and test; got {name}: {hint}"
        )


def check_initial(params: PyTree) -> None:
    """Refuse initial parameters that are not finite.

    Args:
      params: arrays of JAX or NumPy.

    Raises:
      ValueError: an array has a value that is not finite, as after a faulty conversion of a checkpoint.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jax.numpy.issubdtype(leaf.dtype, np.inexact) and not _is_finite(leaf):
            raise ValueError(
                f"the initial parameters must be finite; {jax.tree_util.keystr(path) or 'they'} "
                "hold a number that is not, so every loss would be NaN"
            )


def _is_finite(array: Any) -> bool:
    if isinstance(array, np.ndarray):
        return _first_not_finite(array.reshape(-1)) is None
    return bool(_all_finite(array))


@jax.jit
def _all_finite(array: Any) -> Any:
    return jax.numpy.isfinite(array).all()


def check_examples(split: str, data: PyTree) -> None:
    """Refuse examples that no run can use; see :func:`check_task`.

    Args:
      split: name of the examples in the error message.
      data: the examples.
    """
    leaves = jax.tree_util.tree_leaves_with_path(data)
    if not leaves:
        raise ParameterError(split, f"must hold examples, and is empty: {HOW}")
    lengths = {}
    for path, leaf in leaves:
        place = f"{split}{jax.tree_util.keystr(path)}"
        if not isinstance(leaf, np.ndarray | jax.Array) or leaf.ndim < 1:
            library = f"{type(leaf).__module__.partition('.')[0]} ".removeprefix("builtins ")
            raise ParameterError(place, f"must be an array of examples, got a {library}{type(leaf).__name__}: {HOW}")
        if leaf.dtype.kind in "USOT":
            raise ParameterError(
                place,
                f"must hold numbers, and holds text or objects, {np.asarray(leaf).reshape(-1)[0]!r} first: "
                "number label names, say, by names, numbers = numpy.unique(labels, return_inverse=True)",
            )
        lengths[place] = len(leaf)
        bad = _first_not_finite(leaf)
        if bad is not None:
            raise ParameterError(place, f"must hold finite numbers only; example {bad} has one that is not")
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{place} {length}" for place, length in lengths.items())
        raise ParameterError(split, f"must have as many entries in each array as there are examples, got {found}")
    if not next(iter(lengths.values())):
        raise ParameterError(split, "must hold at least one example, and is empty")


def example_shapes(data: PyTree) -> dict[str, tuple[int, ...]]:
    """The shape of an example in each array of ``data``, by the array's path."""
    leaves = jax.tree_util.tree_leaves_with_path(data)
    return {jax.tree_util.keystr(path): leaf.shape[1:] for path, leaf in leaves}


def _check_alike(train: PyTree, test: PyTree) -> None:
    """Refuse test examples whose arrays are shaped otherwise than the training examples'."""
    tests = example_shapes(test)
    for place, shape in example_shapes(train).items():
        own = tests.get(place, shape)
        if own != shape:
            raise ParameterError(f"test{place}", f"must have examples of the shape of train{place}, {shape}, got {own}")


def _first_not_finite(array: Any) -> int | None:
    """The index of the first example with a value that is not finite; None if there is no such example."""
    if not jax.numpy.issubdtype(array.dtype, np.inexact):
        return None
    # In blocks: the mask of the entire array may not fit into memory beside the array.
    rows = max(1, BLOCK // max(1, array[0].size if len(array) else 1))
    # In the run's dtype: without x64, a float64 may overflow.
    kept = jax.numpy.promote_types(jax.dtypes.canonicalize_dtype(array.dtype), np.float32)
    for begin in range(0, len(array), rows):
        with np.errstate(over="ignore"):
            finite = np.isfinite(np.asarray(array[begin : begin + rows], kept))
        if not finite.all():
            return begin + int(np.argmin(finite.reshape(len(finite), -1).all(1)))
    return None


def _shapes_of_parameters(task: Task) -> PyTree:
    """The shapes of the initial parameters.

    Raises:
      ParameterError: a leaf is no array, an activation function say.
    """
    wrong: list[ParameterError] = []

    def arrays_of(key: Any) -> PyTree:
        made = task.init(key)
        try:
            arrays("init", made)
        except ParameterError as error:
            # Raised outside, where JAX appends no note. Tracers must not leave this function.
            wrong.append(ParameterError(error.parameter, error.message))
            return None
        return made

    shapes = jax.eval_shape(arrays_of, jax.random.key(0))
    if wrong:
        raise wrong[0]
    if not jax.tree.leaves(shapes):
        raise ParameterError("init", "must make at least one parameter, got none")
    return shapes


def _check_loss(task: Task) -> np.dtype:
    count = 2
    params = _shapes_of_parameters(task)

    def shape_of(a: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *a.shape[1:]), jax.dtypes.canonicalize_dtype(a.dtype))

    batch = jax.tree.map(shape_of, task.train)
    frozen = frozen_of(task)
    losses = jax.eval_shape(in_float32(task.loss), params, batch, *([] if frozen is None else [frozen]))
    if isinstance(losses, tuple):
        raise ParameterError(
            "loss",
            "must return the loss of each example and nothing else, got a tuple: what else there is to tell of "
            "an example, return by metrics",
        )
    if getattr(losses, "shape", None) != (count,):
        got = getattr(losses, "shape", type(losses).__name__)
        hint = ": do not take its mean" if got == () else ""
        raise ParameterError("loss", f"must be per example, of shape ({count},) for {count} examples; got {got}{hint}")
    if not jax.numpy.issubdtype(losses.dtype, np.floating):
        raise ParameterError("loss", f"must be a floating-point number for each example, got {losses.dtype}")
    return losses.dtype
