"""Classification of arrays: a task made of a model's two functions and two data splits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from hiso_jax.checks import ParameterError, first_line, kind_of
from hiso_jax.factored import PerturbedAs
from hiso_jax.tasks.splits import held_out


def _as_arrays(name: str, value: Any) -> Any:
    """A column of a split as arrays; NumPy converts torch tensors, pandas columns and lists.

    Raises:
      ValueError: NumPy cannot convert the column.
    """
    if isinstance(value, Mapping):
        return {entry: _as_arrays(f"{name}[{entry!r}]", each) for entry, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_as_arrays(f"{name}[{place}]", each) for place, each in enumerate(value))
    if isinstance(value, np.ndarray | jax.Array | jax.ShapeDtypeStruct):
        return value
    try:
        array = np.asarray(value)
        # Columns of pandas that may have gaps are object arrays.
        return np.asarray(array.tolist()) if array.dtype.kind == "O" else array
    except Exception as error:
        # Tensors that need gradients or are on a device, and rows of unequal lengths, raise different errors.
        library = type(value).__module__.partition(".")[0]
        raise ParameterError(
            name,
            f"must be an array of examples, or what NumPy makes one of; got a {library} {type(value).__name__} "
            f"that it does not ({first_line(error)})",
        ) from error


def _columns_of(split: str, data: Any) -> dict[str, Any]:
    """The columns of a split by name: of a dict, a DataFrame or a ``datasets.Dataset``.

    Raises:
      ValueError: it is none of these, or has no column "label" beside inputs.
    """
    names = getattr(data, "column_names", None)
    if isinstance(names, Mapping):
        raise ParameterError(split, f"must be one split of the datasets.DatasetDict, data[{next(iter(names))!r}] say")
    if isinstance(data, Mapping):
        columns = dict(data)
    elif isinstance(names, list):
        columns = {name: list(data[name]) for name in names}
    elif hasattr(data, "columns"):
        columns = {name: data[name] for name in data.columns}
    else:
        raise ParameterError(
            split,
            'must be a dict with the entries "input" and "label", a DataFrame or a datasets.Dataset; '
            f"got {kind_of(data)}",
        )
    if "label" not in columns or len(columns) < 2 or ("input" in columns and len(columns) > 2):
        raise ParameterError(
            split,
            'must have the entries "input" and "label", or columns of numbers and one called "label"; '
            f"got {', '.join(map(repr, columns)) or 'nothing'}",
        )
    return columns


def _features(split: str, columns: Mapping[str, Any]) -> Float[np.ndarray, "n columns"]:
    """The columns of a table but its label, side by side.

    Raises:
      ValueError: a column does not hold one number for each example.
    """
    features = {name: _as_arrays(f"{split}[{name!r}]", each) for name, each in columns.items() if name != "label"}
    for name, each in features.items():
        if getattr(each, "ndim", 0) != 1 or each.dtype.kind not in "biuf":
            kind = f"{each.dtype} of shape {each.shape}" if hasattr(each, "dtype") else kind_of(each)
            raise ParameterError(
                f"{split}[{name!r}]",
                f"must be one number for each example, got {kind}: leave the column out or encode it, by "
                "pandas.get_dummies say",
            )
    lengths = {name: len(each) for name, each in features.items()}
    if len(set(lengths.values())) > 1:
        raise ParameterError(split, f"must have columns of one length, got {lengths}")
    return np.stack(list(features.values()), axis=1).astype(np.float32)


def _as_numbers(labels: Any) -> Any:
    """Labels as integers if they are floats without fractions, as in a column that once had a gap."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind == "f" and labels.ndim == 1 and (labels % 1 == 0).all():
        return labels.astype(np.int64)
    return labels


def _advice(labels: np.ndarray, classes: int) -> str:
    """How to make numbers of labels that are none."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        return "labels[:, 0] has one for each example"
    if labels.ndim == 2 and labels.shape[1] == classes and labels.dtype.kind in "biuf":
        return "labels.argmax(1) makes numbers of one-hot rows"
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        return f"example {int(np.argmax(np.isnan(labels)))} has no label"
    return "names, numbers = numpy.unique(labels, return_inverse=True) numbers label names"


def _check_inputs(name: str, inputs: Any) -> None:
    """Refuse inputs that are text or objects.

    Raises:
      ParameterError: an array of them is.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(inputs):
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "USOMm":
            place = f"{name}{jax.tree_util.keystr(path)}"
            raise ParameterError(place, f"must hold numbers, got {leaf.dtype}: encode text and dates as numbers first")


def _check_labels(name: str, labels: Any, classes: int) -> None:
    if isinstance(labels, jax.ShapeDtypeStruct):  # of a task with shapes instead of data
        return
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        first = repr(labels.reshape(-1).tolist()[0]) if labels.size else "none"
        raise ParameterError(
            name,
            f"must be one whole number for each example, got {labels.dtype} of shape {labels.shape}, {first} "
            f"first: {_advice(labels, classes)}",
        )
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        example = int(np.argmax(outside))
        raise ParameterError(
            name,
            f"must be at least 0 and below {classes}, the model's number of classes; {int(outside.sum())} are "
            f"not, the first of them {labels[example]} of example {example}",
        )


@dataclass(frozen=True)
class Classification:
    """A classification task over arrays, with cross-entropy loss; it satisfies ``hiso_jax.fed.Task``.

    Attributes:
      model_init: key → parameters.
      model_apply: (parameters, inputs [B, ...]) → logits [B, classes].
      train: {"input": [n, ...], "label": int [n]}; inputs may also be a dict or a tuple of arrays, which the model
        receives unchanged. Torch tensors, pandas columns and lists become NumPy arrays. A DataFrame, a
        ``datasets.Dataset`` or a dict of columns may have columns of numbers in the place of "input": they become
        float32 [n, columns], in their order.
      test: the same for the test split.
      name: the name in reports.
      target: the accuracy at which methods are compared, or None.
      metric: the main metric.
      perturbed_as: the parameters that ``model_apply`` accepts as a weight with a separate low-rank direction, see
        :func:`hiso_jax.zo.perturb`.
    """

    model_init: Callable[[Key[Array, ""]], PyTree]
    model_apply: Callable[[PyTree, Any], Float[Array, "B classes"]]
    train: Any
    test: Any
    name: str = "classification"
    target: float | None = None
    metric: str = "accuracy"
    perturbed_as: PerturbedAs | None = None

    def __post_init__(self) -> None:
        """Check the splits.

        Raises:
          ValueError: a split has other entries than "input" and "label", is empty, or has unequal lengths; labels are
            not integers 0, 1, … of the model's classes; or the model does not return [B, classes] logits.
        """
        tables: list[list[str]] = []
        for split in ("train", "test"):
            columns = _columns_of(split, getattr(self, split))
            data = {"input": columns.get("input"), "label": columns["label"]}
            if "input" not in columns:
                # A table: every column but the label is a feature.
                tables.append([name for name in columns if name != "label"])
                data["input"] = _features(split, columns)
            data = {entry: _as_arrays(f'{split}["{entry}"]', data[entry]) for entry in data}
            data["label"] = _as_numbers(data["label"])
            object.__setattr__(self, split, data)
            _check_inputs(f'{split}["input"]', data["input"])
            counts = {array.shape[0] if array.ndim else 0 for array in jax.tree.leaves(data["input"])}
            labels = data["label"].shape[0] if getattr(data["label"], "ndim", 0) else 0
            if counts != {labels} or not labels:
                got = ", ".join(map(str, sorted(counts))) or "no"
                raise ParameterError(
                    split, f"must have as many inputs as labels and at least one, got {got} and {labels}"
                )
        if len(tables) == 2 and tables[0] != tables[1]:
            raise ParameterError("test", f"must have the columns of train in their order, {tables[0]}; got {tables[1]}")
        classes = self._classes()
        for split in ("train", "test"):
            _check_labels(f'{split}["label"]', getattr(self, split)["label"], classes)

    def _classes(self) -> int:
        """The number of the model's classes.

        Raises:
          ValueError: the model does not return [B, classes] logits.
        """
        inputs = self.train["input"]

        def logits(key: Key[Array, ""], inputs: Any) -> Any:
            return self.model_apply(self.model_init(key), inputs)

        row = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), jax.dtypes.canonicalize_dtype(a.dtype)), inputs
        )
        try:
            jax.eval_shape(self.model_init, jax.random.key(0))
        except TypeError as error:
            raise ParameterError(
                "model_init", f"must make parameters from a key; it fails: {first_line(error)}"
            ) from error
        try:
            given = jax.eval_shape(logits, jax.random.key(0), row)
        except TypeError as error:
            shapes = ", ".join(str(leaf.shape) for leaf in jax.tree.leaves(row))
            raise ParameterError(
                "model_apply",
                f"must take the task's inputs, of shape {shapes} for one example; it fails: {first_line(error)}",
            ) from error
        if getattr(given, "ndim", None) != 2 or given.shape[0] != 1:
            got = getattr(given, "shape", f"a {type(given).__name__}")
            raise ParameterError("model_apply", f"must give logits of shape [B, classes], here (1, classes); got {got}")
        return given.shape[1]

    def init(self, key: Key[Array, ""]) -> PyTree:
        """The initial parameters."""
        return self.model_init(key)

    def loss(self, params: PyTree, batch: Mapping[str, Array]) -> Float[Array, "B"]:
        """The cross-entropy of each example, in float32 or wider."""
        logits = self.model_apply(params, batch["input"])
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    def metrics(self, params: PyTree, batch: Mapping[str, Array]) -> dict[str, Float[Array, "B"]]:
        """``loss`` and ``accuracy`` of each example."""
        logits = self.model_apply(params, batch["input"])
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        predicted = logits.argmax(-1)
        return {
            "loss": optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]),
            "accuracy": (predicted == batch["label"].astype(predicted.dtype)).astype(jnp.float32),
        }

    def hold_out(self, examples: int, *, seed: int = 0) -> "Classification":
        """The same task with ``examples`` random training examples as its test split, for tuning.

        Raises:
          ValueError: a split would have no examples.
        """
        kept, held = held_out(self.train, examples, seed)
        return replace(self, train=kept, test=held)
