"""MNIST (LeCun, Cortes, Burges) and Fashion-MNIST (arXiv 1708.07747) from local IDX files or the datasets hub."""

import gzip
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from hiso_jax.checks import ParameterError
from hiso_jax.extras import import_extra
from hiso_jax.models import Model, cnn, mlp
from hiso_jax.tasks.classification import Classification

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


class Images(NamedTuple):
    """A data set of 28×28 images in MNIST's file format.

    Attributes:
      name: the name of the task.
      hub_name: the name of the data on the datasets hub.
      mean, deviation: mean and standard deviation of the training images, in units of the largest pixel value.
      target: the accuracy at which methods are compared.
    """

    name: str
    hub_name: str
    mean: float
    deviation: float
    target: float


MNIST = Images("mnist", "ylecun/mnist", 0.1307, 0.3081, 0.80)
FASHION = Images("fashion-mnist", "zalando-datasets/fashion_mnist", 0.2860, 0.3530, 0.70)


def read_idx(path: Path) -> UInt8[np.ndarray, "..."]:
    """The array in an IDX file of unsigned bytes, plain or gzip-compressed.

    Layout: two zero bytes, a type byte (0x08), the number of axes, each axis' length as a big-endian uint32, then
    the values.

    Raises:
      ValueError: the file is missing, has another layout, or is shorter or longer than its header says.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise ValueError(f"no such IDX file: {path}") from None
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    axes = content[3]
    start = 4 + 4 * axes
    shape = tuple(int(n) for n in np.frombuffer(content[4:start], ">u4")) if len(content) >= start else ()
    expected = start + int(np.prod(shape, dtype=np.int64))
    if len(content) < start or len(content) != expected:
        raise ValueError(f"{path} is truncated or damaged: {len(content)} bytes where its header says {expected}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise ParameterError("data_dir", f"must hold {name} or {name}.gz; {folder} has neither")


def _from_files(folder: Path, images_of: Images, wanted: Collection[str]) -> dict[str, dict[str, np.ndarray]]:
    splits: dict[str, dict[str, np.ndarray]] = {}
    for split, (image_name, label_name) in FILES.items():
        if split not in wanted:
            continue
        images, labels = read_idx(_find(folder, image_name)), read_idx(_find(folder, label_name))
        if images.shape != (len(labels), 28, 28) or labels.ndim != 1 or (labels.size and labels.max() > 9):
            raise ValueError(
                f"{folder} does not hold {images_of.name}: {image_name} has shape {images.shape}, {label_name} "
                f"{labels.shape}"
            )
        splits[split] = {"input": images[..., None], "label": labels.astype(np.int32)}
    return splits


def _from_hub(images_of: Images) -> dict[str, dict[str, np.ndarray]]:
    datasets = import_extra("datasets", "data_dir", f"must name a folder with the four IDX files of {images_of.name}")
    # The client logs each retry; the error below is enough.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        loaded: Any = datasets.load_dataset(images_of.hub_name)
    except Exception as error:
        # Every error of the hub's client (no network, no such name, a damaged cache) means the same here.
        raise ParameterError(
            "data_dir",
            f"must name a folder with the four IDX files of {images_of.name} where the hub is out of reach; "
            f"loading {images_of.hub_name} gave {type(error).__name__}",
        ) from error
    splits: dict[str, dict[str, np.ndarray]] = {}
    for split in FILES:
        rows = loaded[split].with_format("numpy")
        splits[split] = {
            "input": np.stack([np.asarray(image, np.uint8) for image in rows["image"]])[..., None],
            "label": np.asarray(rows["label"]).astype(np.int32),
        }
    return splits


def mnist_network(model: str | None = None) -> Model:
    """The network of ``mnist(model=model)``; None means its default.

    Raises:
      ValueError: ``model`` is unknown.
    """
    if model in (None, "cnn"):
        return cnn(side=28, kernel=5, features=(16, 32))
    if model == "mlp":
        return mlp(side=28, hidden=32)
    raise ParameterError("model", f"must be cnn or mlp for mnist, got {model}")


def mnist(
    data_dir: str | Path | None = None, model: str = "cnn", *, splits: Collection[str] = tuple(FILES)
) -> Classification:
    """MNIST, 60,000 training and 10,000 test images, kept as bytes and standardised on the device.

    Args:
      data_dir: a folder with the four IDX files, gzip-compressed or not; None loads from the ``datasets`` hub.
      model: ``"cnn"`` (5×5×16, 5×5×32, linear; 28,938 parameters) or ``"mlp"`` (one hidden layer of 32).
      splits: the splits that are here; one image of zeros stands in for each of the others.

    Raises:
      ValueError: ``model`` is unknown, or the data is missing, truncated or not MNIST.
    """
    return _loaded(MNIST, data_dir, model, splits)


def fashion_mnist(
    data_dir: str | Path | None = None, model: str = "cnn", *, splits: Collection[str] = tuple(FILES)
) -> Classification:
    """Fashion-MNIST, with the file names and networks of :func:`mnist` and its own normalisation and target.

    Args:
      data_dir: a folder with the four IDX files, gzip-compressed or not; None loads from the ``datasets`` hub.
      model: ``"cnn"`` or ``"mlp"``.
      splits: as in :func:`mnist`.

    Raises:
      ValueError: as in :func:`mnist`.
    """
    return _loaded(FASHION, data_dir, model, splits)


def _loaded(images_of: Images, data_dir: str | Path | None, model: str, wanted: Collection[str]) -> Classification:
    if data_dir is not None:
        here = _from_files(Path(data_dir), images_of, wanted)
    else:
        here = _from_hub(images_of) if wanted else {}
    stand_in = {"input": np.zeros((1, 28, 28, 1), np.uint8), "label": np.zeros(1, np.int32)}
    splits = {split: here[split] if split in wanted else stand_in for split in FILES}
    return _task(images_of, splits, mnist_network(model))


def mnist_shapes(model: str = "cnn", *, name: str = "mnist") -> Classification:
    """The task ``mnist`` or ``fashion-mnist``, by ``name``, with shapes instead of data: nothing is loaded."""

    def split(rows: int) -> dict[str, Any]:
        return {
            "input": jax.ShapeDtypeStruct((rows, 28, 28, 1), np.uint8),
            "label": jax.ShapeDtypeStruct((rows,), np.int32),
        }

    images_of = {own.name: own for own in (MNIST, FASHION)}[name]
    return _task(images_of, {"train": split(60_000), "test": split(10_000)}, mnist_network(model))


def _task(images_of: Images, splits: Mapping[str, Mapping[str, Any]], network: Model) -> Classification:
    def apply(params: PyTree, images: UInt8[Array, "B 28 28 1"]) -> Float[Array, "B 10"]:
        return network.apply(params, (images.astype(jnp.float32) / 255 - images_of.mean) / images_of.deviation)

    return Classification(
        model_init=network.init,
        model_apply=apply,
        perturbed_as=network.perturbed_as,
        train=splits["train"],
        test=splits["test"],
        name=images_of.name,
        target=images_of.target,
    )
