"""Tasks from arrays."""

import datasets
import jax
import numpy as np
import pandas as pd
import pytest

import hiso_jax
from hiso_jax import tasks


def make(train, test):
    return tasks.Classification(lambda key: {}, lambda params, x: x, train, test)


def split(inputs, labels):
    return {"input": np.zeros((inputs, 3)), "label": np.zeros(labels, int)}


@pytest.mark.parametrize(
    ("train", "test", "sentence"),
    [
        ({"x": 1}, split(2, 2), 'train must have the entries "input" and "label"'),
        (split(2, 2), split(2, 3), "test must have as many inputs as labels"),
        (split(0, 0), split(2, 2), "at least one, got 0 and 0"),
        (
            split(2, 2),
            {**split(2, 2), "label": np.array([0, 9])},
            r'test\["label"\] must be .* below 3, .* 9 of example 1',
        ),
        ({**split(2, 2), "label": np.array([-1, 0])}, split(2, 2), r"the first of them -1 of example 0"),
        ({**split(2, 2), "label": np.array(["a", "b"])}, split(2, 2), "'a' first: names, numbers = numpy.unique"),
        ({**split(2, 2), "label": np.zeros((2, 3))}, split(2, 2), r"got float64 of shape \(2, 3\)"),
    ],
)
def test_malformed_splits_are_refused(train, test, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(train, test)


TABLE = {"a": [1, 2, 3, 4], "b": [0.5, 1.5, 2.5, 3.5], "c": [True, False, True, False], "label": [0, 1, 2, 1]}


def _dataset(columns):
    return datasets.Dataset.from_dict(columns)


@pytest.mark.parametrize("of", [dict, pd.DataFrame, _dataset])
def test_columns_of_a_table_are_the_inputs(of):
    task = make(of(TABLE), of(TABLE))
    np.testing.assert_array_equal(task.train["input"], [[1, 0.5, 1], [2, 1.5, 0], [3, 2.5, 1], [4, 3.5, 0]])
    assert task.train["input"].dtype == np.float32
    np.testing.assert_array_equal(task.train["label"], TABLE["label"])


@pytest.mark.parametrize("of", [dict, pd.DataFrame, _dataset])
def test_a_column_of_vectors_is_the_input(of):
    data = of({"input": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "label": [0, 1]})
    np.testing.assert_array_equal(make(data, data).train["input"], [[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            pd.DataFrame({"a": [1], "city": ["Bern"], "label": [0]}),
            r"train\['city'\] must be one number .*get_dummies",
        ),
        (pd.DataFrame({"a": [1], "b": [2]}), "train must have .* one called \"label\"; got 'a', 'b'"),
        (pd.DataFrame({"input": [1], "b": [2], "label": [0]}), "train must have .* got 'input', 'b', 'label'"),
        (
            datasets.DatasetDict({"train": _dataset(TABLE)}),
            r"one split of the .*DatasetDict, data\['train'\] say",
        ),
        ([1, 2], "train must be a dict .*, a DataFrame or a datasets.Dataset; got a list"),
        ({"a": [1, 2], "b": [1], "label": [0, 1]}, "train must have columns of one length"),
    ],
)
def test_a_table_that_is_none_is_refused(data, sentence):
    with pytest.raises(hiso_jax.ParameterError, match=sentence):
        make(data, split(2, 2))


def test_hold_out_moves_training_examples_and_leaves_the_test_split_alone():
    task = tasks.digits()
    held = task.hold_out(200, seed=1)
    assert (len(held.train["label"]), len(held.test["label"])) == (1237, 200)
    before = np.sort(task.train["input"].reshape(1437, -1), axis=0)
    after = np.sort(np.concatenate([held.train["input"], held.test["input"]]).reshape(1437, -1), axis=0)
    np.testing.assert_array_equal(before, after)
    with pytest.raises(ValueError, match="examples must be at least 1 and below 1437, got 1437"):
        task.hold_out(1437)


def test_loss_is_the_cross_entropy():
    task = make(split(2, 2), split(2, 2))
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]))
    batch = {"input": jax.numpy.asarray(logits), "label": np.array([0, 1])}
    np.testing.assert_allclose(task.loss({}, batch), -np.log([0.7, 0.1]), rtol=1e-6)
    np.testing.assert_array_equal(task.metrics({}, batch)["accuracy"], [1.0, 0.0])


@pytest.mark.parametrize("apply", [lambda params, x: x.sum(1), lambda params, x: (x, x)])
def test_a_model_without_logits_is_refused(apply):
    with pytest.raises(ValueError, match=r"model_apply must give logits of shape \[B, classes\]"):
        tasks.Classification(lambda key: {}, apply, split(2, 2), split(2, 2))


def test_inputs_may_be_several_arrays_and_come_from_other_libraries():
    import pandas

    frame = pandas.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0], "label": [1.0, 0.0]})

    class Tensor:
        """An object like a tensor of torch: NumPy makes an array of it, or it raises."""

        def __init__(self, fails=False):
            self.fails = fails

        def __array__(self, dtype=None, copy=None):
            if self.fails:
                raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
            return np.ones((2, 2), np.float32)

    def apply(params, inputs):
        return inputs["frame"] * inputs["tensor"]

    def of(tensor, labels):
        data = {"input": {"frame": frame[["a", "b"]], "tensor": tensor}, "label": labels}
        return tasks.Classification(lambda key: {}, apply, data, data)

    task = of(Tensor(), frame["label"])
    assert task.train["label"].dtype.kind == "i"
    assert task.train["label"].tolist() == [1, 0]
    np.testing.assert_array_equal(task.train["input"]["frame"], [[1, 3], [2, 4]])
    assert of(Tensor(), pandas.array([1, 0], "Int64")).train["label"].tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"'tensor'\] must be an array .* that it does not \(Can't call numpy"):
        of(Tensor(fails=True), [1, 0])
    with pytest.raises(ValueError, match="got 2 and 3"):
        of(Tensor(), [1, 0, 1])
    with pytest.raises(ValueError, match="one whole number for each example, got float64"):
        of(Tensor(), [0.5, 1.0])
