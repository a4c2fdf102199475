"""Classification of images: CIFAR-10 as it is distributed, folders of images by class, and columns of ``datasets``."""

import io
import json
import pickle
import re
import tarfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from hiso_jax.checks import ParameterError, first_line, integer
from hiso_jax.extras import import_extra
from hiso_jax.models import Model, cnn, lenet, resnet18
from hiso_jax.tasks.classification import Classification
from hiso_jax.tasks.freeze import train_only

NETWORKS = ("cnn", "lenet", "resnet18")
CIFAR10_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# The folder and the archive of each distribution, and the files of the splits; the second is of pickles.
BINARY = ("cifar-10-batches-bin", "cifar-10-binary.tar.gz")
PICKLED = ("cifar-10-batches-py", "cifar-10-python.tar.gz")
BATCHES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
PIXELS = 32 * 32 * 3
TRAIN, TEST = ("train", "training"), ("test", "validation", "valid", "val")
SPLITS = {"train": TRAIN, "test": TEST}
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Share of the examples that are for testing where a folder has no splits.
HELD_OUT = 0.2
DEFAULT_SIDE = 32


@dataclass(frozen=True)
class Scale:
    """How bytes become the numbers that a model reads: (byte / 255 − mean) / deviation, for each colour.

    Attributes:
      mean, deviation: of red, green and blue, in units of the largest byte.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def __call__(self, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
        """The numbers, float32."""
        return (images.astype(jnp.float32) / 255 - jnp.array(self.mean)) / jnp.array(self.deviation)


# Of CIFAR-10's training images, and of ImageNet's, by which pretrained models are scaled.
CIFAR10_SCALE = Scale((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
IMAGENET_SCALE = Scale((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def image_network(model: str, *, side: int, classes: int) -> Model:
    """A network for ``side``×``side`` colour images, by its name.

    Raises:
      ParameterError: the name is unknown, or the network does not take images of this size.
    """
    if model not in NETWORKS:
        raise ParameterError(
            "model", f"must be {', '.join(NETWORKS)}, or a folder of a vision model of transformers; got {model}"
        )
    if side < 16 or side % 4:
        raise ParameterError("side", f"must be a multiple of 4 from 16 on for {model}, got {side}")
    if model == "cnn":
        return cnn(side=side, kernel=5, features=(32, 64), classes=classes, channels=3)
    return (lenet if model == "lenet" else resnet18)(side=side, classes=classes)


class _Arrays(pickle.Unpickler):
    """Reads the pickles of CIFAR-10: dicts, lists, bytes and NumPy's arrays, and runs nothing else."""

    ALLOWED = (
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    )

    def find_class(self, module: str, name: str) -> Any:
        """A class of :attr:`ALLOWED`.

        Raises:
          pickle.UnpicklingError: it is another.
        """
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def _of_binary(content: bytes, source: str) -> dict[str, np.ndarray]:
    """Records of a label and 3,072 bytes."""
    if not content or len(content) % (PIXELS + 1):
        raise ValueError(f"{source} is truncated or damaged: {len(content):,} bytes are no records of {PIXELS + 1:,}")
    records = np.frombuffer(content, np.uint8).reshape(-1, PIXELS + 1)
    return _planes(records[:, 1:], records[:, 0], source)


def _of_pickle(content: bytes, source: str) -> dict[str, np.ndarray]:
    """A dict with data [n, 3072] and labels."""
    try:
        batch = _Arrays(io.BytesIO(content), encoding="bytes").load()
        data, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except Exception as error:
        # A damaged pickle raises errors of many types.
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{source} is no batch of CIFAR-10, or a damaged one ({reason})") from error
    return _planes(data, labels, source)


def _planes(data: np.ndarray, labels: np.ndarray, source: str) -> dict[str, np.ndarray]:
    """Images of three planes as [n, 32, 32, 3], with their labels."""
    is_whole = data.ndim == 2 and data.shape[1] == PIXELS and data.dtype == np.uint8 and labels.shape == data.shape[:1]
    if not is_whole or labels.dtype.kind not in "iu" or (labels.size and not 0 <= labels.min() <= labels.max() <= 9):
        raise ValueError(f"{source} does not hold CIFAR-10: data {data.shape} {data.dtype}, labels {labels.shape}")
    images = np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return {"input": images, "label": labels.astype(np.int32)}


def _cifar10_files(folder: Path, wanted: Collection[str]) -> dict[str, dict[str, np.ndarray]]:
    """The splits of CIFAR-10 in one of its distributions, unpacked or not.

    Raises:
      ParameterError: the folder has none, or not all of its files.
      ValueError: a file is damaged.
    """
    for (name, archive), read, end in ((BINARY, _of_binary, ".bin"), (PICKLED, _of_pickle, "")):
        for place in (folder / name, folder):
            if all((place / f"{batch}{end}").is_file() for split in wanted for batch in BATCHES[split]):
                return _joined(partial(_read_batch, place, end), read, wanted)
        if (folder / archive).is_file():
            try:
                with tarfile.open(folder / archive) as files:

                    def content(batch: str, files: Any = files, name: str = name, end: str = end) -> bytes:
                        found = files.extractfile(f"{name}/{batch}{end}")
                        return b"" if found is None else found.read()

                    return _joined(content, read, wanted)
            except (tarfile.TarError, OSError, EOFError, KeyError) as error:
                raise ValueError(f"{folder / archive} cannot be read: {first_line(error)}") from error
    raise ParameterError(
        "data_dir",
        f"must hold {BINARY[0]}, {PICKLED[0]}, {BINARY[1]} or {PICKLED[1]} with all batches; {folder} has none of them",
    )


def _read_batch(place: Path, end: str, batch: str) -> bytes:
    return (place / f"{batch}{end}").read_bytes()


def _joined(
    content: Callable[[str], bytes], read: Callable[[bytes, str], dict[str, np.ndarray]], wanted: Collection[str]
) -> dict[str, dict[str, np.ndarray]]:
    """The splits, each of all its batches."""
    splits = {}
    for split in wanted:
        batches = [read(content(batch), batch) for batch in BATCHES[split]]
        splits[split] = {name: np.concatenate([each[name] for each in batches]) for name in ("input", "label")}
    return splits


def _cifar10_from_hub() -> dict[str, dict[str, np.ndarray]]:
    datasets = import_extra("datasets", "data_dir", "must name a folder with the files of CIFAR-10")
    try:
        loaded: Any = datasets.load_dataset("uoft-cs/cifar10")
    except Exception as error:
        # Every error of the hub's client means the same here.
        raise ParameterError(
            "data_dir",
            f"must name a folder with the files of CIFAR-10 ({BINARY[1]} or {PICKLED[1]}, unpacked or not) where the "
            f"hub is out of reach; it gave {type(error).__name__}",
        ) from error
    return {
        split: {
            "input": np.stack([np.asarray(image, np.uint8) for image in loaded[split]["img"]]),
            "label": np.asarray(loaded[split]["label"], np.int32),
        }
        for split in SPLITS
    }


def cifar10(
    data_dir: str | Path | None = None, model: str = "cnn", *, splits: Collection[str] = tuple(SPLITS)
) -> Classification:
    """CIFAR-10 (Krizhevsky, 2009): 50,000 training and 10,000 test images, kept as bytes and scaled on the device.

    Args:
      data_dir: a folder with the distribution in binary files or in pickles, unpacked or not; None loads from the
        ``datasets`` hub. Pickles are read without running what they may name.
      model: ``"cnn"`` (5×5×32, 5×5×64, linear; 94,666 parameters), ``"lenet"`` (LeNet-5, 62,006) or ``"resnet18"``
        (group norms, 11,173,962).
      splits: the splits that are here; one image of zeros stands in for each of the others.

    Raises:
      ValueError: ``model`` is unknown, or the data is missing or damaged.
    """
    network = image_network(model, side=32, classes=10)
    here = _cifar10_files(Path(data_dir), splits) if data_dir is not None else _cifar10_from_hub() if splits else {}
    return _task(network, CIFAR10_SCALE, {**_stand_ins(32), **here}, "cifar10")


def cifar10_shapes(model: str = "cnn") -> Classification:
    """:func:`cifar10` with shapes instead of data: nothing is loaded."""
    data = {split: _shapes(rows, 32) for split, rows in (("train", 50_000), ("test", 10_000))}
    return _task(image_network(model, side=32, classes=10), CIFAR10_SCALE, data, "cifar10")


def _shapes(rows: int, side: int) -> dict[str, Any]:
    return {
        "input": jax.ShapeDtypeStruct((rows, side, side, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((rows,), np.int32),
    }


def _stand_ins(side: int) -> dict[str, dict[str, np.ndarray]]:
    one: dict[str, np.ndarray] = {"input": np.zeros((1, side, side, 3), np.uint8), "label": np.zeros(1, np.int32)}
    return dict.fromkeys(SPLITS, one)


def _task(network: Model, scale: Scale, data: Mapping[str, Any], name: str) -> Classification:
    def apply(params: PyTree, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B classes"]:
        return network.apply(params, scale(images))

    return Classification(
        model_init=network.init,
        model_apply=apply,
        perturbed_as=network.perturbed_as,
        train=data["train"],
        test=data["test"],
        name=name,
    )


def image_classification(
    data: str | Path | Mapping[str, Any],
    model: str = "cnn",
    *,
    side: int | None = None,
    labels: Sequence[str] | None = None,
    trained: str | None = None,
    splits: Collection[str] = tuple(SPLITS),
) -> Any:
    """Images in folders by class, or in columns, as a task.

    Every image is scaled so that its shorter side is ``side`` pixels, cut to its central square, and kept as three
    bytes a pixel.

    Args:
      data: a folder with ``train/CLASS/*`` and ``test/CLASS/*`` (or ``validation``), or ``CLASS/*`` alone, of which a
        random fifth is then for testing, or Parquet files ``train*`` and ``test*`` with columns ``image`` and
        ``label``; or {"train": rows, "test": rows} of such columns, as ``datasets`` has them.
      model: ``"cnn"``, ``"lenet"``, ``"resnet18"``, or a folder of a vision model of ``transformers``, which runs by
        torch (extra ``torch``) and gets a new head where it has another number of classes.
      side: pixels along a side; by default the pretrained model's, or 32.
      labels: the names of the classes in their order; by default those of the data, in alphabetical order. Machines
        that hold different classes must be given all of them.
      trained: a regular expression; entries of the parameters (torch: names) whose names it matches are trained.
      splits: the splits that are here; one image of zeros stands in for each of the others.

    Raises:
      ParameterError: the data has not two classes, an image cannot be read, or the model does not take its size.
    """
    if side is not None:
        integer("side", side, 16)
    if labels is None and set(splits) != set(SPLITS):
        raise ParameterError(
            "labels", "must be given where only one of the splits is here: its classes may not be those of the other"
        )
    found = _rows_of(data, splits)
    names = _classes_of(found, labels)
    network, scale, size = image_model(model, len(names), side)
    arrays = {split: _as_arrays(rows, names, size, split) for split, rows in found.items()}
    task = _task(network, scale, {**_stand_ins(size), **arrays}, "image-classification")
    if trained is None:
        return task
    chosen = trained_names(list(network.init(jax.random.key(0))), trained)
    return task if len(chosen) == len(network.init(jax.random.key(0))) else train_only(task, *chosen)


def image_model(model: str, classes: int, side: int | None) -> tuple[Model, Scale, int]:
    """The network that :func:`image_classification` trains, the scale of its images, and their pixels along a side.

    Raises:
      ParameterError: the model is unknown, or does not take images of this size.
    """
    if model not in NETWORKS and Path(model).is_dir():
        return _pretrained(Path(model), classes, side)
    size = DEFAULT_SIDE if side is None else side
    return image_network(model, side=size, classes=classes), IMAGENET_SCALE, size


def trained_names(names: Sequence[str], pattern: str) -> list[str]:
    """The entries of the parameters whose names match.

    Raises:
      ParameterError: none does, or the pattern is no regular expression.
    """
    try:
        chosen = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise ParameterError("trained", f"must be a regular expression: {error}") from error
    if not chosen:
        raise ParameterError("trained", f"must match some of {', '.join(names[:4])}, …, {names[-1]}; got {pattern!r}")
    return chosen


Rows = Sequence[tuple[Any, Any]]
"""An image in any form, and the name or number of its class."""


def _rows_of(data: str | Path | Mapping[str, Any], wanted: Collection[str]) -> dict[str, Rows]:
    """The rows of the wanted splits.

    Raises:
      ParameterError: a split is missing or empty.
    """
    if isinstance(data, Mapping):
        missing = [split for split in wanted if split not in data]
        if missing:
            raise ParameterError("data", f"must have the splits train and test; {', '.join(missing)} is missing")
        found = {split: _columns(data[split], split) for split in wanted}
    else:
        folder = Path(data)
        if not folder.is_dir():
            raise ParameterError("data_dir", f"must be a folder of images by class; there is no folder {folder}")
        found = _in_folder(folder, wanted)
    for split, rows in found.items():
        if not rows:
            raise ParameterError("data_dir" if not isinstance(data, Mapping) else "data", f"has no images for {split}")
    return found


def _in_folder(folder: Path, wanted: Collection[str]) -> dict[str, Rows]:
    inside = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    places = {split: next((inside[name] for name in names if name in inside), None) for split, names in SPLITS.items()}
    if any(places.values()):
        return {split: _by_class(places[split], folder, split) for split in wanted}
    tables = {split: _tables(folder, SPLITS[split]) for split in wanted}
    if any(tables.values()):
        return {split: _of_tables(tables[split], folder, split) for split in wanted}
    rows = _by_class(folder, folder, "train")
    order = np.random.default_rng(0).permutation(len(rows))
    held = max(1, round(HELD_OUT * len(rows)))
    parts = {"test": order[:held], "train": order[held:]}
    return {split: [rows[place] for place in sorted(parts[split])] for split in wanted}


def _by_class(place: Path | None, folder: Path, split: str) -> Rows:
    """The images below a folder, whose subfolders are the classes."""
    if place is None:
        raise ParameterError("data_dir", f"must hold a folder {' or '.join(SPLITS[split])}; {folder} has none")
    return [
        (path, each.name)
        for each in sorted(place.iterdir())
        if each.is_dir()
        for path in sorted(each.rglob("*"))
        if path.suffix.lower() in ENDINGS and path.is_file()
    ]


def _tables(folder: Path, names: Sequence[str]) -> list[Path]:
    """The Parquet files of a split."""
    files = [path for place in (folder, folder / "data") if place.is_dir() for path in sorted(place.glob("*.parquet"))]
    return [path for path in files if re.match(rf"({'|'.join(names)})\b", path.name.lower())]


def _of_tables(paths: Sequence[Path], folder: Path, split: str) -> Rows:
    if not paths:
        raise ParameterError("data_dir", f"must hold Parquet files {split}*.parquet; {folder} has none")
    parquet = import_extra("pyarrow.parquet", "data_dir", "must hold folders of images")
    tables = [parquet.read_table(path).to_pydict() for path in paths]
    if any(table.keys() != tables[0].keys() for table in tables):
        raise ParameterError("data_dir", f"must hold Parquet files of the same columns; those of {split} differ")
    columns = {name: [value for table in tables for value in table[name]] for name in tables[0]}
    return _columns(columns, split)


def _columns(data: Any, split: str) -> Rows:
    """Rows of the columns ``image`` (or ``img``) and ``label``."""
    names = getattr(data, "column_names", None) or list(data)
    image = next((name for name in ("image", "img") if name in names), None)
    if image is None or "label" not in names:
        raise ParameterError("data", f"must have columns image and label; {split} has {', '.join(map(str, names))}")
    kind: Any = getattr(data, "features", {}).get("label")
    labels = list(data["label"])
    if hasattr(kind, "int2str"):
        labels = [kind.int2str(int(each)) for each in labels]
    return list(zip(data[image], labels, strict=True))


def _classes_of(found: Mapping[str, Rows], labels: Sequence[str] | None) -> list[Any]:
    """The classes in their order.

    Raises:
      ParameterError: there are fewer than two, one is given twice, or the data has others than those given.
    """
    seen = {label for rows in found.values() for _, label in rows}
    if labels is None:
        names = sorted(seen, key=lambda each: (isinstance(each, str), each))
    else:
        names = list(labels)
        if len(set(names)) != len(names):
            raise ParameterError("labels", f"must not repeat, got {', '.join(names)}")
        others = sorted(map(str, {str(each) for each in seen} - set(names)))
        if others:
            raise ParameterError("labels", f"must name all classes of the data; it has {', '.join(others[:3])}, too")
    if len(names) < 2:
        raise ParameterError("data_dir", f"must have at least two classes, got {', '.join(map(str, names)) or 'none'}")
    return names


def _as_arrays(rows: Rows, names: Sequence[Any], side: int, split: str) -> dict[str, np.ndarray]:
    numbers = {str(name): number for number, name in enumerate(names)}
    images = np.empty((len(rows), side, side, 3), np.uint8)
    for place, (image, _) in enumerate(rows):
        try:
            images[place] = _square(image, side)
        except Exception as error:
            # Pillow raises errors of many types.
            where = image if isinstance(image, Path) else f"image {place} of {split}"
            raise ParameterError(
                "data_dir", f"must hold images that can be read; {where} cannot ({first_line(error)})"
            ) from error
    return {"input": images, "label": np.array([numbers[str(label)] for _, label in rows], np.int32)}


def _square(image: Any, side: int) -> UInt8[np.ndarray, "side side 3"]:
    """An image as a central square of ``side`` pixels, in colour."""
    from PIL import Image

    if isinstance(image, Mapping):
        image = image["bytes"] if image.get("bytes") is not None else Path(image["path"])
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    if isinstance(image, str | Path | io.BytesIO):
        with Image.open(image) as opened:
            image = opened.convert("RGB")
    elif not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image, np.uint8))
    image = image.convert("RGB")
    width, height = image.size
    if (width, height) == (side, side):
        return np.asarray(image)
    share = side / min(width, height)
    image = image.resize((max(side, round(width * share)), max(side, round(height * share))), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


def _pretrained(folder: Path, classes: int, side: int | None) -> tuple[Model, Scale, int]:
    """A vision model of transformers, the scale of its images, and their size.

    Raises:
      ParameterError: the extra is not installed, or the folder has no model that classifies images.
    """
    from hiso_jax.models.torch import from_torch, libraries

    try:
        torch = libraries()[0]
    except ParameterError as error:
        raise ParameterError(
            "model",
            f"must be {', '.join(NETWORKS)}, or the extra torch be installed for a folder of a vision model "
            f"(pip install '.[torch]'); got {folder}",
        ) from error
    transformers = import_extra("transformers", "model", f"must be {', '.join(NETWORKS)}")
    torch.manual_seed(0)  # of a new head
    try:
        module = transformers.AutoModelForImageClassification.from_pretrained(
            folder,
            num_labels=classes,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except Exception as error:
        raise ParameterError(
            "model", f"must be a folder of a vision model of transformers; {folder} is not ({first_line(error)[:200]})"
        ) from error
    settings = folder / "preprocessor_config.json"
    try:
        given = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    except (OSError, ValueError) as error:
        raise ParameterError("model", f"must have a readable preprocessor_config.json; {settings}: {error}") from error
    scale = Scale(
        tuple(given.get("image_mean") or IMAGENET_SCALE.mean), tuple(given.get("image_std") or IMAGENET_SCALE.deviation)
    )
    size = given.get("size") or {}
    sides = [size.get("height"), size.get("shortest_edge")] if isinstance(size, Mapping) else [size]
    own = next((each for each in (side, *sides, getattr(module.config, "image_size", None)) if each), 224)
    model = from_torch(module)

    def apply(params: PyTree, images: Float[Array, "B H W 3"]) -> Float[Array, "B classes"]:
        return model.apply(params, {"pixel_values": jnp.moveaxis(images, 3, 1)})

    return Model(model.init, apply, model.perturbed_as), scale, int(own)


def classes_in(folder: Path) -> int:
    """The number of classes in a folder, without reading an image."""
    return len(_classes_of(_rows_of(folder, tuple(SPLITS)), None))
