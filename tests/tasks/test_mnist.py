"""MNIST from IDX files and from the hub, on small data made here."""

import gzip

import datasets
import jax
import numpy as np
import pytest

from hiso_jax import tasks
from hiso_jax.tasks.mnist import FASHION, FILES, MNIST, read_idx
from tests.marks import slow

COUNTS = {"train": 30, "test": 7}


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def arrays(split):
    rng = np.random.default_rng(len(split))
    count = COUNTS[split]
    return rng.integers(0, 256, (count, 28, 28), np.uint8), rng.integers(0, 10, count).astype(np.uint8)


@pytest.fixture(params=[False, True], ids=["plain", "gzip"])
def folder(tmp_path, request):
    for split, names in FILES.items():
        for name, array in zip(names, arrays(split), strict=True):
            content = idx(array)
            path = tmp_path / (f"{name}.gz" if request.param else name)
            path.write_bytes(gzip.compress(content) if request.param else content)
    return tmp_path


def assert_is_ours(task):
    for split in COUNTS:
        images, labels = arrays(split)
        data = getattr(task, split)
        np.testing.assert_array_equal(data["input"][..., 0], images)
        np.testing.assert_array_equal(data["label"], labels)
        assert data["label"].dtype == np.int32
    batch = jax.tree.map(lambda a: a[:4], dict(task.train))
    assert task.loss(task.init(jax.random.key(0)), batch).shape == (4,)


@pytest.mark.parametrize("model", [slow("cnn"), "mlp"])
def test_idx_files(folder, model):
    assert_is_ours(tasks.mnist(folder, model))


def test_fashion_is_normalised_by_its_own_numbers(folder):
    """The same files give the same task but for the normalisation, the name and the target."""
    digits, clothes = tasks.mnist(folder, "mlp"), tasks.fashion_mnist(folder, "mlp")
    assert_is_ours(clothes)
    assert (clothes.name, clothes.target) == ("fashion-mnist", 0.70)
    params, images = digits.init(jax.random.key(0)), digits.train["input"][:4]
    own = clothes.model_apply(params, images)
    kernel, bias = params["hidden"]["kernel"], params["hidden"]["bias"]
    hidden = np.maximum((images.reshape(4, -1) / 255 - 0.2860) / 0.3530 @ np.asarray(kernel) + np.asarray(bias), 0)
    expected = hidden @ np.asarray(params["output"]["kernel"]) + np.asarray(params["output"]["bias"])
    np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("make", [tasks.mnist, tasks.fashion_mnist])
def test_the_hub(monkeypatch, make):
    """The real ``datasets`` objects, images encoded as PNG as on the hub; only the download is left out."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})

    def load_dataset(name):
        assert name == {tasks.mnist: MNIST, tasks.fashion_mnist: FASHION}[make].hub_name
        splits = {}
        for split in COUNTS:
            images, labels = arrays(split)
            columns = {"image": list(images), "label": labels.tolist()}
            splits[split] = datasets.Dataset.from_dict(columns, features=features)
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert_is_ours(make())


def test_a_hub_out_of_reach_is_one_sentence(monkeypatch):
    def load_dataset(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"^data_dir must name a folder .* loading ylecun/mnist gave ConnectionError$"):
        tasks.mnist()


def damage(folder, change):
    path = next(folder.glob("train-images*"))
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda content: content[:-100], "truncated or damaged|cannot be read"),
        (lambda content: content[:2], "not an IDX file|cannot be read|truncated"),
        (lambda content: b"", "not an IDX file"),
        (lambda content: b"<html>not found</html>", "not an IDX file"),
    ],
)
def test_a_damaged_file_is_named(folder, change, sentence):
    damage(folder, change)
    with pytest.raises(ValueError, match=sentence) as error:
        tasks.mnist(folder)
    assert "train-images-idx3-ubyte" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(folder):
    next(folder.glob("t10k-labels*")).unlink()
    with pytest.raises(ValueError, match="data_dir must hold t10k-labels-idx1-ubyte"):
        tasks.mnist(folder)


def test_other_data_in_idx_files_is_refused(tmp_path):
    for names in FILES.values():
        for name in names:
            (tmp_path / name).write_bytes(idx(np.zeros((5, 8, 8) if "images" in name else (5,), np.uint8)))
    with pytest.raises(ValueError, match="does not hold mnist"):
        tasks.mnist(tmp_path)


def test_bytes_too_many_are_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(idx(np.arange(6, dtype=np.uint8)) + b"x")
    with pytest.raises(ValueError, match="15 bytes where its header says 14"):
        read_idx(path)
