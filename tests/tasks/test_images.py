"""CIFAR-10 in its distributions, images in folders and in columns, and their networks, on small data made here."""

import importlib.util
import io
import json
import pickle
import tarfile

import datasets
import jax
import numpy as np
import pytest
from PIL import Image

from hiso_jax import Experiment, fed, models, tasks
from hiso_jax.checks import ParameterError
from hiso_jax.tasks import images
from tests.fed.problems import assert_trees_identical
from tests.marks import thorough

COUNT = 6


def planes(split):
    """[n, 3, 32, 32] and labels of each batch of a split."""
    rng = np.random.default_rng(len(split))
    batches = images.BATCHES[split]
    return [(rng.integers(0, 256, (COUNT, 3, 32, 32), np.uint8), rng.integers(0, 10, COUNT).tolist()) for _ in batches]


def batch_bytes(pixels, labels, kind):
    if kind == "bin":
        return b"".join(bytes([label]) + image.tobytes() for image, label in zip(pixels, labels, strict=True))
    return pickle.dumps({b"data": pixels.reshape(COUNT, -1), b"labels": labels}, protocol=2)


def write_cifar10(folder, kind, packed):
    name, archive = images.BINARY if kind == "bin" else images.PICKLED
    content = {}
    for split, batches in images.BATCHES.items():
        for batch, (pixels, labels) in zip(batches, planes(split), strict=True):
            content[f"{batch}.bin" if kind == "bin" else batch] = batch_bytes(pixels, labels, kind)
    folder.mkdir()
    if packed:
        with tarfile.open(folder / archive, "w:gz") as files:
            for file, data in content.items():
                info = tarfile.TarInfo(f"{name}/{file}")
                info.size = len(data)
                files.addfile(info, io.BytesIO(data))
        return folder
    (folder / name).mkdir()
    for file, data in content.items():
        (folder / name / file).write_bytes(data)
    return folder


@pytest.mark.parametrize("kind", ["bin", "py"])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_is_read_as_it_is_distributed(kind, packed, tmp_path):
    folder = write_cifar10(tmp_path / "data", kind, packed)
    task = tasks.cifar10(folder, "lenet")
    for split in images.SPLITS:
        pixels, labels = zip(*planes(split), strict=True)
        np.testing.assert_array_equal(task_data(task, split)["input"].transpose(0, 3, 1, 2), np.concatenate(pixels))
        np.testing.assert_array_equal(task_data(task, split)["label"], np.concatenate(labels))
    # A folder of the batches themselves, and a machine with the training files alone.
    if not packed:
        own = next(folder.iterdir())
        assert len(tasks.cifar10(own, "lenet").test["label"]) == COUNT
        for file in own.glob("test_batch*"):
            file.unlink()
        assert len(tasks.cifar10(folder, "lenet", splits=("train",)).test["label"]) == 1


def task_data(task, split):
    return getattr(task, split)


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "data_batch_1 is no batch of CIFAR-10, or a damaged one"),
        (pickle.dumps({b"data": np.zeros((2, 5), np.uint8), b"labels": [1, 2]}), "does not hold CIFAR-10"),
        (pickle.dumps(Evil()), r"data_batch_1 is no batch of CIFAR-10.*it refers to builtins\.print"),
    ],
)
def test_a_batch_that_is_none_is_refused_and_runs_nothing(content, sentence, tmp_path, capsys):
    folder = write_cifar10(tmp_path / "data", "py", packed=False)
    (folder / images.PICKLED[0] / "data_batch_1").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        tasks.cifar10(folder)
    assert "run" not in capsys.readouterr().out


def test_cifar10_without_files_says_what_would_do(tmp_path):
    with pytest.raises(ParameterError, match="data_dir must hold cifar-10-batches-bin, cifar-10-batches-py"):
        tasks.cifar10(tmp_path)
    (tmp_path / images.BINARY[1]).write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz cannot be read"):
        tasks.cifar10(tmp_path)
    with pytest.raises(ParameterError, match="model must be cnn, lenet, resnet18, or a folder"):
        tasks.cifar10(tmp_path, "vgg")


SIZES = {("cnn", 32): 94_666, ("lenet", 32): 62_006, ("resnet18", 32): 11_173_962}


@pytest.mark.parametrize(("name", "side"), SIZES)
def test_networks_have_their_published_sizes(name, side):
    network = images.image_network(name, side=side, classes=10)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == SIZES[name, side]
    out = jax.eval_shape(network.apply, shapes, jax.ShapeDtypeStruct((2, side, side, 3), np.float32))
    assert out.shape == (2, 10)


def test_a_resnet_of_large_images_divides_them_first():
    network = models.resnet18(side=128, classes=7)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert shapes["conv"]["kernel"].shape == (7, 7, 3, 64)
    out = jax.eval_shape(network.apply, shapes, jax.ShapeDtypeStruct((2, 128, 128, 3), np.float32))
    assert out.shape == (2, 7)


@pytest.mark.parametrize("name", ["lenet", thorough("resnet18")])
def test_networks_are_those_of_torch(name):
    """The same weights in torch's own layers, where torch is installed; ResNet's shapes and norms block by block."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    functions = torch.nn.functional
    network = images.image_network(name, side=32, classes=10)
    params = jax.tree.map(np.asarray, network.init(jax.random.key(3)))
    pixels = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)

    def conv(x, layer, strides=1, padding=0):
        kernel = torch.tensor(layer["kernel"].transpose(3, 2, 0, 1))
        bias = torch.tensor(layer["bias"]) if "bias" in layer else None
        return functions.conv2d(x, kernel, bias, strides, padding)

    def same(x, layer, strides):
        # Flax pads one row more at the end than at the beginning for even sizes.
        reach = layer["kernel"].shape[0] - strides
        x = functions.pad(x, (reach // 2, reach - reach // 2) * 2) if reach > 0 else x
        return conv(x, layer, strides)

    def normed(x, layer):
        return functions.group_norm(x, 32, torch.tensor(layer["scale"]), torch.tensor(layer["bias"]), 1e-6)

    def linear(x, layer):
        return x @ torch.tensor(layer["kernel"]) + torch.tensor(layer["bias"])

    x = torch.tensor(pixels.transpose(0, 3, 1, 2))
    if name == "lenet":
        x = functions.max_pool2d(functions.relu(conv(x, params["conv1"])), 2)
        x = functions.max_pool2d(functions.relu(conv(x, params["conv2"])), 2)
        x = x.permute(0, 2, 3, 1).reshape(2, -1)
        x = functions.relu(linear(x, params["hidden1"]))
        expected = linear(functions.relu(linear(x, params["hidden2"])), params["output"])
    else:
        x = functions.relu(normed(same(x, params["conv"], 1), params["norm"]))
        for stage in range(1, 5):
            for block in range(1, 3):
                own, strides = params[f"block{stage}_{block}"], 2 if stage > 1 and block == 1 else 1
                y = functions.relu(normed(same(x, own["conv1"], strides), own["norm1"]))
                y = normed(same(y, own["conv2"], 1), own["norm2"])
                beside = normed(same(x, own["conv3"], strides), own["norm3"]) if "conv3" in own else x
                x = functions.relu(y + beside)
        expected = linear(x.mean((2, 3)), params["output"])
    found = jax.jit(network.apply)(params, pixels)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-5 * float(expected.abs().max()))


def picture(number, size=(20, 12)):
    """A picture whose colour says its class: red, or blue."""
    noise = np.random.default_rng(number).integers(0, 60, (size[1], size[0], 3))
    noise[..., 0 if number % 2 else 2] += 190
    return Image.fromarray(noise.astype(np.uint8))


def write_folder(folder, splits=("train", "test"), count=12, end="png"):
    for split in splits:
        for number in range(count):
            place = folder / split / ("red" if number % 2 else "blue")
            place.mkdir(parents=True, exist_ok=True)
            picture(number).save(place / f"{number:02d}.{end}")
    return folder


def test_folders_by_class(tmp_path):
    task = tasks.image_classification(write_folder(tmp_path), side=16)
    assert task.train["input"].shape == (12, 16, 16, 3)
    assert task.train["input"].dtype == np.uint8
    assert task.train["label"].tolist() == [0] * 6 + [1] * 6
    # Blue pictures first; the shorter side is scaled, and the longer one cut.
    assert (task.train["input"][:6, ..., 2] > task.train["input"][:6, ..., 0]).all()
    whole = picture(0).resize((27, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(task.train["input"][0], np.asarray(whole)[:, 5:21])


def test_a_folder_without_splits_keeps_a_fifth_for_testing(tmp_path):
    write_folder(tmp_path, splits=(".",), count=20)
    task = tasks.image_classification(tmp_path, side=16)
    assert (len(task.train["label"]), len(task.test["label"])) == (16, 4)
    again = tasks.image_classification(tmp_path, side=16)
    np.testing.assert_array_equal(again.test["input"], task.test["input"])


def encoded(number):
    stream = io.BytesIO()
    picture(number).save(stream, "png")
    return stream.getvalue()


def test_columns_are_those_of_the_folder(tmp_path):
    """Of datasets, of Parquet files, and of a dict of arrays."""
    folder = tasks.image_classification(write_folder(tmp_path / "folder"), side=16)
    order = [*range(0, 12, 2), *range(1, 12, 2)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["blue", "red"])})
    columns = {"image": [picture(number) for number in order], "label": [number % 2 for number in order]}
    rows = datasets.Dataset.from_dict(columns, features=features)
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    for data in (
        {"train": rows, "test": rows},
        {"train": {**columns, "image": [np.asarray(each) for each in columns["image"]]}, "test": columns},
        tmp_path,
    ):
        task = tasks.image_classification(data, side=16)
        for split in ("train", "test"):
            np.testing.assert_array_equal(getattr(task, split)["input"], getattr(folder, split)["input"])
            np.testing.assert_array_equal(getattr(task, split)["label"], getattr(folder, split)["label"])


@pytest.mark.parametrize(
    ("change", "given", "sentence"),
    [
        (
            lambda f: (f / "train" / "red" / "01.png").write_bytes(b"none"),
            {},
            "must hold images that can be read; .*01.png",
        ),
        (lambda f: [each.unlink() for each in f.rglob("test/*/*")], {}, "has no images for test"),
        (None, {"side": 18}, "side must be a multiple of 4 from 16 on for cnn, got 18"),
        (None, {"side": 8}, "side must be at least 16, got 8"),
        (None, {"labels": ["blue"]}, "labels must name all classes of the data; it has red, too"),
        (None, {"labels": ["blue", "blue", "red"]}, "labels must not repeat"),
        (None, {"model": "vgg"}, "model must be cnn, lenet, resnet18, or a folder"),
        (None, {"trained": "nothing"}, "trained must match some of conv1, conv2, .*output; got 'nothing'"),
        (None, {"trained": "("}, "trained must be a regular expression"),
    ],
)
def test_what_is_no_task_is_one_sentence(change, given, sentence, tmp_path):
    write_folder(tmp_path)
    if change is not None:
        change(tmp_path)
    with pytest.raises(ParameterError, match=sentence):
        tasks.image_classification(tmp_path, **{"side": 16, **given})


def test_a_machine_with_one_split_is_given_the_classes(tmp_path):
    write_folder(tmp_path, splits=("train",))
    with pytest.raises(ParameterError, match="labels must be given where only one of the splits is here"):
        tasks.image_classification(tmp_path, side=16, splits=("train",))
    task = tasks.image_classification(tmp_path, side=16, splits=("train",), labels=["blue", "green", "red"])
    assert task.train["label"].tolist() == [0] * 6 + [2] * 6
    assert len(task.test["label"]) == 1


def test_one_class_is_none(tmp_path):
    (tmp_path / "train" / "red").mkdir(parents=True)
    (tmp_path / "test" / "red").mkdir(parents=True)
    for split in ("train", "test"):
        picture(1).save(tmp_path / split / "red" / "1.png")
    with pytest.raises(ParameterError, match="data_dir must have at least two classes, got red"):
        tasks.image_classification(tmp_path)
    with pytest.raises(ParameterError, match="data_dir must be a folder of images by class; there is no folder"):
        tasks.image_classification(tmp_path / "none")


def experiment_of(folder, **given):
    return Experiment(
        task="image-classification", data_dir=folder, side=16, algorithm="mosaic", learning_rate=0.3, rounds=10,
        eval_every=5, clients=4, cohort=4, batch_size=4, **given,
    )  # fmt: skip


def test_a_run_learns_and_replays(tmp_path):
    experiment = experiment_of(write_folder(tmp_path / "data", count=24), trained="output|conv2")
    result = experiment.run(tmp_path / "run")
    assert set(result.params) == {"conv2", "output"}
    assert result.metrics[-1].metrics["loss"] < result.metrics[0].metrics["loss"]
    replayed, _ = fed.replay(result.initial_params, experiment.algorithm, result.records)
    assert_trees_identical(replayed, result.params)


def call(*words):
    from hiso_jax.cli.main import main

    with pytest.raises(SystemExit) as ending:
        main([str(word) for word in words])
    return ending.value.code or 0


@pytest.mark.thorough
def test_a_run_from_the_command_line_is_exported_and_applied(tmp_path):
    folder = write_folder(tmp_path / "data", count=24)
    shared = ["--task", "image-classification", "--data-dir", folder, "--side", 16, "--trained", "output"]
    few = ["--rounds", 4, "--clients", 4, "--cohort", 2, "--batch-size", 4, "--learning-rate", 0.1]
    assert call("run", *shared, *few, "--labels", "blue,red", "--out", tmp_path / "run") == 0
    assert call("replay", tmp_path / "run") == 0
    assert call("export", tmp_path / "run", "--out", tmp_path / "delta.safetensors") == 0
    assert call("apply", tmp_path / "delta.safetensors", "--out", tmp_path / "model.safetensors") == 0
    from safetensors.numpy import load_file

    assert set(load_file(tmp_path / "model.safetensors")) >= {"output/kernel", "output/bias"}


@pytest.mark.thorough
def test_a_vision_model_of_transformers_is_trained(tmp_path):
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    if importlib.util.find_spec("torchax") is None:
        pytest.skip("the extra torch is not installed")
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "vit")
    half = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 16, "width": 16}}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(half))
    folder = write_folder(tmp_path / "data", count=24)
    experiment = Experiment(
        task="image-classification", data_dir=folder, model=str(tmp_path / "vit"), trained="^classifier",
        algorithm="decomfl", learning_rate=0.1, rounds=10, eval_every=10, clients=4, cohort=4, batch_size=4,
    )  # fmt: skip
    result = experiment.run(tmp_path / "run")
    assert set(result.params) == {"classifier.weight", "classifier.bias"}
    assert result.metrics[-1].metrics["loss"] < result.metrics[0].metrics["loss"]
    replayed, _ = fed.replay(result.initial_params, experiment.algorithm, result.records)
    assert_trees_identical(replayed, result.params)
    # Before the head, the numbers are those of torch.
    pixels = (experiment.task.train["input"][:3].astype(np.float32) / 255 - 0.5) / 0.25
    with torch.no_grad():
        states = model.vit(torch.tensor(pixels.transpose(0, 3, 1, 2))).last_hidden_state[:, 0].numpy()
    expected = states @ np.asarray(result.params["classifier.weight"]).T + np.asarray(result.params["classifier.bias"])
    whole = {**experiment.task.frozen, **result.params}
    found = experiment.task.task.model_apply(whole, experiment.task.train["input"][:3])
    np.testing.assert_allclose(found, expected, atol=1e-5)
