"""Tasks by name: a model, its loss and its data, as ``--task`` and ``Experiment`` choose them.

A task is a factory ``name(seed, *, options)`` that returns a :class:`hiso_jax.fed.Task`; a task that draws nothing at
random takes no seed. ``@hiso_jax.choices.defaults`` declares the options whose defaults the task changes. A factory may
carry functions for callers that do not need all of the data: ``base``, options → the initial model of a run;
``shapes``, options → the task with shapes instead of arrays; and ``of_splits``, splits → the factory of a task of which
only these splits are here, and examples of the same shapes stand in for the others. ``from_checkpoint`` says that it
fine-tunes a pretrained model; ``labelled`` says whether its examples have labels, by which they can be partitioned.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
from jaxtyping import PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.choices import Factory, Kind, Listed, defaults
from hiso_jax.tasks.digits import digits as load_digits
from hiso_jax.tasks.digits import digits_network
from hiso_jax.tasks.images import CIFAR10_LABELS, cifar10_shapes, classes_in, image_model, image_network, trained_names
from hiso_jax.tasks.images import cifar10 as load_cifar10
from hiso_jax.tasks.images import image_classification as load_images
from hiso_jax.tasks.mnist import fashion_mnist as load_fashion_mnist
from hiso_jax.tasks.mnist import mnist as load_mnist
from hiso_jax.tasks.mnist import mnist_network, mnist_shapes
from hiso_jax.tasks.trainables import TRAINABLES, Trainable

_CLASSIFIES = ("sst2", "qqp", "rte", "boolq", "cb", "wic", "wsc", "multirc", "ag_news", "text-classification")
_GENERATES = ("squad", "drop", "xsum")
_CONVERSES = "chat"
# Options of the language model, not of the data.
LOADED = ("model", "revision", "dtype", "param_dtype", "trainable")
Precision = Literal["float32", "bfloat16"]
Words = Annotated[tuple[str, ...] | None, Listed(str, "WORD,WORD,…", strip=False)]
Names = Annotated[tuple[str, ...] | None, Listed(str, "NAME,NAME,…")]
# 2 of 6 clients, as in the papers, and few rounds, so that a run takes minutes.
TEXT_DEFAULTS: dict[str, Any] = {
    "rounds": 24,
    "eval_every": 6,
    "clients": 6,
    "cohort": 2,
    "batch_size": 16,
    # Options of a comparison: each trial is a run of minutes.
    "schedules": ("constant",),
    "tries": 3,
    "tuning_seeds": 1,
    "seeds": 1,
}
# Examples of generation have no labels, so they cannot be partitioned by label.
LABELLED: dict[str, Any] = {"partition": "dirichlet-balanced", "alpha": 1.0}
UNLABELLED: dict[str, Any] = {"partition": "iid"}


class Base(NamedTuple):
    """The initial model of a run.

    Attributes:
      params: the trained parameters.
      frozen: the frozen parameters, or None.
      pretrained, tuned: the language model before and after the choice of its trained part, or None.
    """

    params: PyTree
    frozen: PyTree | None = None
    pretrained: Any = None
    tuned: Any = None


def _network(
    factory: Factory, network: Callable[[Any], Any], shapes: Callable[..., Any], load: Factory | None = None
) -> Factory:
    """The factory of an image task, with its functions ``base`` and ``shapes``, and ``of_splits`` if it has files.

    ``load(*, model, data_dir, splits)`` loads a task with files.
    """

    def base(seed: int, key: Any, *, model: Any = None, **rest: Any) -> Base:
        return Base(network(model).init(key))

    vars(factory).update(base=base, shapes=shapes)
    if load is not None:
        vars(factory)["of_splits"] = lambda splits: wraps(factory)(partial(load, splits=splits))
    return factory


def digits(*, model: Literal["mlp", "cnn"] = "mlp") -> Any:
    """8×8 handwritten digits, embedded in the package.

    Args:
      model: mlp or cnn.
    """
    return load_digits(model)


def mnist(*, model: Literal["cnn", "mlp"] = "cnn", data_dir: Path | None = None) -> Any:
    """MNIST.

    Args:
      model: cnn or mlp.
      data_dir: folder with the four IDX files, gzip-compressed or not; by default the datasets hub.
    """
    return load_mnist(data_dir, model)


def fashion_mnist(*, model: Literal["cnn", "mlp"] = "cnn", data_dir: Path | None = None) -> Any:
    """Fashion-MNIST.

    Args:
      model: cnn or mlp.
      data_dir: folder with the four IDX files, gzip-compressed or not; by default the datasets hub.
    """
    return load_fashion_mnist(data_dir, model)


def cifar10(*, model: Literal["cnn", "lenet", "resnet18"] = "cnn", data_dir: Path | None = None) -> Any:
    """CIFAR-10.

    Args:
      model: cnn, lenet or resnet18.
      data_dir: folder with CIFAR-10's files as they are distributed (binary or pickles), unpacked or not; by default
        the datasets hub.
    """
    return load_cifar10(data_dir, model)


def images(
    *,
    model: str = "cnn",
    data_dir: Path | None = None,
    side: int | None = None,
    labels: Names = None,
    trained: str | None = None,
) -> Any:
    """Images in folders by class.

    Args:
      model: cnn, lenet, resnet18, or a folder of a vision model of transformers, which runs by torch.
      data_dir: folder with train/CLASS/* and test/CLASS/*, or CLASS/* alone, or Parquet files with columns image and
        label.
      side: pixels along a side, to which images are scaled and cut; by default the pretrained model's, or 32.
      labels: names of the classes in their order; by default those of the data, in alphabetical order.
      trained: regular expression over the entries of the parameters; those that match are trained, by default all.
    """
    return _images(model, data_dir, side, labels, trained)


def _images(model: str, data_dir: Path | None, side: Any, labels: Any, trained: Any, **splits: Any) -> Any:
    if data_dir is None:
        raise ParameterError("data_dir", "must be given for image-classification: a folder of images by class")
    return load_images(data_dir, model, side=side, labels=labels, trained=trained, **splits)


def _image_shapes(**options: Any) -> Any:
    raise ParameterError("task", "must not be image-classification where nothing is read; cifar10 has its networks")


def _image_folder() -> Factory:
    """The factory of ``image-classification``, with its functions."""

    def base(
        seed: int,
        key: Any,
        *,
        model: str = "cnn",
        data_dir: Path | None = None,
        side: int | None = None,
        labels: Any = None,
        trained: str | None = None,
    ) -> Base:
        if labels is None and data_dir is None:
            raise ParameterError("labels", "must be given for a run whose folder of images is not here")
        classes = len(labels) if labels is not None else classes_in(Path(str(data_dir)))
        network = image_model(model, classes, side)[0]
        params = network.init(key)
        if trained is None:
            return Base(params)
        # As tasks.train_only takes them.
        kept, chosen = network.init(jax.random.key(0)), trained_names(list(params), trained)
        frozen = {name: value for name, value in kept.items() if name not in chosen}
        return Base({name: params[name] for name in chosen}, frozen or None)

    vars(images).update(
        base=base,
        shapes=_image_shapes,
        of_splits=lambda splits: wraps(images)(partial(_images_of, splits=splits)),
    )
    return images


def _images_of(
    *, model: str, data_dir: Path | None, side: Any, labels: Any, trained: Any, splits: Collection[str]
) -> Any:
    return _images(model, data_dir, side, labels, trained, splits=splits)


def _cifar10_shapes(*, model: str = "cnn", data_dir: Any = None) -> Any:
    task = cifar10_shapes(model)
    return task, jax.eval_shape(task.init, jax.random.key(0))


def _mnist_shapes(name: str) -> Callable[..., Any]:
    def shapes(*, model: str = "cnn", data_dir: Any = None) -> Any:
        task = mnist_shapes(model, name=name)
        return task, jax.eval_shape(task.init, jax.random.key(0))

    return shapes


def _digits_shapes(*, model: str = "mlp") -> Any:
    task = load_digits(model)
    return task, jax.eval_shape(task.init, jax.random.key(0))


def text(
    name: str,
    seed: int,
    *,
    model: str | None = None,
    revision: str | None = None,
    data_dir: Path | None = None,
    prompts: Literal["decomfl", "mezo"] = "decomfl",
    template: str | None = None,
    verbalizer: Words = None,
    labels: Names = None,
    column: str | None = None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    samples: int = 0,
    train_rows: int | None = None,
    test_rows: int | None = None,
    trainable: str = "lora",
    dtype: Precision = "float32",
    param_dtype: Precision = "float32",
    splits: Collection[str] = ("train", "test"),
) -> Any:
    """A text task for a language model.

    Args:
      name: name of the task.
      seed: seed of the choice of rows and of adapters.
      model: language model (OPT, Llama, Mistral, Qwen2, Qwen3, SmolLM3, Gemma 2, Gemma 3, Phi-3) as hub name, folder
        with safetensors, or .gguf file.
      revision: branch, tag or commit of a hub model; converted takes the pull request of the hub's converter, which
        has the safetensors that old checkpoints lack.
      data_dir: folder with train and validation files (.jsonl, .csv, .parquet) of the task's columns; by default the
        datasets hub.
      prompts: prompts and answer words of DeComFL and HiSo, or of MeZO; the papers' numbers of rows, rates and weight
        decay are separate options.
      template: prompt with columns of the data in braces, for text-classification or instead of the task's prompt.
      verbalizer: answer word of each label, in the order of the labels, with its blanks; replaces the task's words.
      labels: label of each answer word, in the order of the words, for text labels; by default alphabetical.
      column: column of the text data that names the client of each training row.
      max_length: most tokens of a prompt (a longer prompt keeps its end); by default the task's or the model's.
      max_new_tokens: most tokens to generate; by default the task's.
      temperature: temperature at which an objective of generated answers samples them in training; 0 is greedy, as
        evaluations always are.
      samples: number of test prompts that each evaluation shows with the model's answers.
      train_rows: number of random training rows to use; by default all, for generation 1,000.
      test_rows: number of random test rows to use; None means all, for generation 100.
      trainable: all, lora, prefix, head, a regular expression over the parameters' dotted paths, or your own as
        path/to/file.py:name.
      dtype: dtype of the computation; losses are always float32.
      param_dtype: dtype of the parameters; bfloat16 is rounded stochastically, so that no update is lost.
      splits: the splits that are here, see :func:`hiso_jax.tasks.text_data`.
    """
    from hiso_jax.tasks.text import text_data, text_task

    check_model(name, model)
    data = text_data(
        name,
        data_dir=data_dir,
        prompts=prompts,
        template=template,
        verbalizer=verbalizer,
        labels=labels,
        train_rows=train_rows,
        test_rows=test_rows,
        client_column=column,
        seed=seed,
        splits=splits,
    )
    pretrained, tuned = _language_model(name, seed, model, revision, dtype, param_dtype, trainable)
    return text_task(
        data,
        tuned,
        pretrained,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        samples=samples,
    )


def check_model(name: str, model: str | None) -> None:
    """Refuse a name that is not that of a language model, before anything is loaded.

    Raises:
      ParameterError: ``model`` names no language model, or a file or folder that does not exist.
    """
    if model is None or model in ("mlp", "cnn"):
        raise ParameterError("model", f"must name a language model for {name}: by hub name, a folder or a .gguf file")
    looks_local = model.endswith(".gguf") or model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_local and not Path(model).exists():
        raise ParameterError("model", f"must be a hub name, a folder or a .gguf file; there is no {model}")


def _language_model(
    name: str,
    seed: int,
    model: str | None,
    revision: str | None,
    dtype: Precision,
    param_dtype: Precision,
    trainable: Any,
) -> tuple[Any, Any]:
    """A pretrained language model, and the same model with its trained part chosen."""
    check_model(name, model)
    assert model is not None
    # Imported here because the import needs the extra lm.
    from hiso_jax.models import lm

    pretrained = lm.load(model, revision=revision, dtype=dtype, param_dtype=param_dtype)
    return pretrained, _as_trainable(trainable)(pretrained, seed)


def _as_trainable(trainable: Any) -> Any:
    """The trainable that a name chooses; other values are returned unchanged."""
    return TRAINABLES.load(trainable).build({}) if isinstance(trainable, str) else trainable


def _text_shapes(name: str, own: Mapping[str, Any]) -> Any:
    """A text task with shapes instead of arrays, and the shapes of its trained parameters; no weights are read."""
    from hiso_jax.models import lm
    from hiso_jax.tasks.text import PROMPTS, text_shapes

    model, trainable = own["model"], _as_trainable(own["trainable"])
    if not isinstance(trainable, Trainable):
        raise ParameterError("trainable", "must be all, lora, prefix, head or a pattern where no weights are read")
    if model is None:
        raise ParameterError("model", f"must name an architecture ({', '.join(lm.SHAPES)}), a folder or a hub's model")
    if model.lower() in lm.SHAPES and not Path(model).exists():
        architecture = lm.SHAPES[model.lower()]
    else:
        check_model(name, model)
        architecture = lm.read_architecture(model, revision=own["revision"])
    tuned = trainable.shapes(lm.Decoder(architecture, own["dtype"]), own["param_dtype"])
    known = PROMPTS[own["prompts"]].get(name)
    words = own["verbalizer"] or (() if known is None else known.words)
    task = text_shapes(
        name,
        tuned,
        classes=max(len(words), 2),
        max_length=own["max_length"],
        max_new_tokens=own["max_new_tokens"],
        rows=(own["train_rows"] or 8192, own["test_rows"] or 1000),
    )
    return task, tuned.trained


def _text(name: str, *without: str, **changed: Any) -> Factory:
    """The factory of a text task: :func:`text` with the task's name, without the options that the task ignores."""

    def make(seed: int, **options: Any) -> Any:
        return text(name, seed, **options)

    def of_splits(splits: Collection[str]) -> Factory:
        return wraps(make)(partial(make, splits=splits))

    def base(seed: int, key: Any, **options: Any) -> Base:
        own = {each: (without_options | options)[each] for each in LOADED}
        pretrained, tuned = _language_model(name, seed, **own)
        return Base(tuned.trained, tuned.frozen, pretrained, tuned)

    def shapes(**options: Any) -> Any:
        return _text_shapes(name, without_options | options)

    hidden = inspect.signature(text).parameters
    without_options = {each.name: changed.get(each.name, each.default) for each in hidden.values()}
    kept = [
        each.replace(default=changed.get(each.name, each.default))
        for each in hidden.values()
        if each.name not in ("name", "splits") and each.name not in without
    ]
    vars(make).update(
        __signature__=inspect.Signature(kept),
        base=base,
        shapes=shapes,
        of_splits=of_splits,
        from_checkpoint=True,
        labelled=name in _CLASSIFIES,
    )
    make.__annotations__ = {each.name: each.annotation for each in kept}
    make.__doc__, make.__name__ = text.__doc__, name
    return make


# Options of tasks that generate.
_GENERATING = ("max_new_tokens", "temperature", "samples")
TASKS = Kind(
    "task",
    {
        "digits": _network(digits, digits_network, _digits_shapes),
        "mnist": _network(mnist, mnist_network, _mnist_shapes("mnist"), load_mnist),
        "fashion-mnist": _network(fashion_mnist, mnist_network, _mnist_shapes("fashion-mnist"), load_fashion_mnist),
        "cifar10": _network(
            cifar10,
            lambda model: image_network(model or "cnn", side=32, classes=len(CIFAR10_LABELS)),
            _cifar10_shapes,
            load_cifar10,
        ),
        "image-classification": _image_folder(),
        **{
            name: defaults(**TEXT_DEFAULTS, **LABELLED)(_text(name, *_GENERATING, test_rows=200))
            for name in _CLASSIFIES[:-1]
        },
        **{
            name: defaults(**TEXT_DEFAULTS, **UNLABELLED)(_text(name, "template", "verbalizer", "labels"))
            for name in _GENERATES
        },
        _CONVERSES: defaults(**TEXT_DEFAULTS, **UNLABELLED)(
            _text(_CONVERSES, "template", "verbalizer", "labels", "prompts")
        ),
        "text-classification": defaults(**TEXT_DEFAULTS, **LABELLED)(
            _text("text-classification", *_GENERATING, "prompts", test_rows=200)
        ),
    },
    ("seed",),
    "Task",
    is_valid=lambda made: all(hasattr(made, name) for name in ("train", "test", "init", "loss", "metrics")),
)
