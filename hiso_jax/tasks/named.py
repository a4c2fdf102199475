"""Tasks by name: a model, its loss and its data, as ``--task`` and ``Experiment`` choose them.

A task is a factory ``name(seed, *, options)`` that returns a :class:`hiso_jax.fed.Task`; a task that draws nothing at
random takes no seed. ``@hiso_jax.choices.defaults`` declares the options that have other defaults with it. A factory
may carry two functions of its options, which spare those who need them its data: ``base``, the model that a run began
as, and ``shapes``, the task with shapes in place of arrays.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
from jaxtyping import PyTree

from hiso_jax.checks import ParameterError, positive, whole
from hiso_jax.choices import Factory, Kind, Listed, defaults
from hiso_jax.tasks.digits import digits as load_digits
from hiso_jax.tasks.digits import digits_network
from hiso_jax.tasks.mnist import fashion_mnist as load_fashion_mnist
from hiso_jax.tasks.mnist import mnist as load_mnist
from hiso_jax.tasks.mnist import mnist_network, mnist_shapes

_CLASSIFIES = ("sst2", "qqp", "rte", "boolq", "cb", "wic", "wsc", "multirc", "ag_news", "text-classification")
_GENERATES = ("squad", "drop", "xsum")
Precision = Literal["float32", "bfloat16"]
Words = Annotated[tuple[str, ...] | None, Listed(str, "WORD,WORD,…", strip=False)]
Names = Annotated[tuple[str, ...] | None, Listed(str, "NAME,NAME,…")]
Targets = Annotated[tuple[str, ...], Listed(str, "A,B,…")]
LORA = {"lora_rank": 8, "lora_alpha": 16.0, "lora_targets": ("q_proj", "v_proj")}
PREFIX = {"prefix_tokens": 5}
# The papers' 2 of 6 clients, and rounds that end within minutes.
TEXT_DEFAULTS: dict[str, Any] = {
    "rounds": 24,
    "eval_every": 6,
    "clients": 6,
    "cohort": 2,
    "batch_size": 16,
    # Of a comparison, whose every trial is a run of minutes.
    "schedules": ("constant",),
    "tries": 3,
    "tuning_seeds": 1,
    "seeds": 1,
}
# Answers have no labels, by which examples could be split.
LABELLED: dict[str, Any] = {"partition": "dirichlet-balanced", "alpha": 1.0}
UNLABELLED: dict[str, Any] = {"partition": "iid"}


class Base(NamedTuple):
    """The model that a run began as.

    Attributes:
      params: trained parameters.
      frozen: the others, or None.
      pretrained, tuned: of a language model.
    """

    params: PyTree
    frozen: PyTree | None = None
    pretrained: Any = None
    tuned: Any = None


def _network(factory: Factory, network: Callable[[Any], Any], shapes: Callable[..., Any]) -> Factory:
    """The factory of an image task, with the functions of its network."""

    def base(seed: int, key: Any, *, model: Any = None, **rest: Any) -> Base:
        return Base(network(model).init(key))

    vars(factory).update(base=base, shapes=shapes, rates="images")
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
      data_dir: folder with the four IDX files, gzip-compressed or not; without it the datasets hub is asked.
    """
    return load_mnist(data_dir, model)


def fashion_mnist(*, model: Literal["cnn", "mlp"] = "cnn", data_dir: Path | None = None) -> Any:
    """Fashion-MNIST.

    Args:
      model: cnn or mlp.
      data_dir: folder with the four IDX files, gzip-compressed or not; without it the datasets hub is asked.
    """
    return load_fashion_mnist(data_dir, model)


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
    train_rows: int | None = None,
    test_rows: int | None = None,
    trainable: str = "lora",
    lora_rank: int = 8,
    lora_alpha: float = 16.0,
    lora_targets: Targets = ("q_proj", "v_proj"),
    prefix_tokens: int = 5,
    dtype: Precision = "float32",
    param_dtype: Precision = "float32",
) -> Any:
    """A task of text for a language model.

    Args:
      name: of the task.
      seed: of the choice of rows, and of adapters.
      model: a language model (OPT, Llama, Mistral, Qwen2) by hub name, as a folder with safetensors, or as a .gguf
        file.
      revision: branch, tag or commit of a hub's model; converted takes the pull request of the hub's converter, which
        has the safetensors that old checkpoints lack.
      data_dir: folder with train and validation files (.jsonl, .csv, .parquet) of the task's columns; without it the
        datasets hub is asked.
      prompts: prompts and answer words of DeComFL and HiSo, or of MeZO; their numbers of rows, rates and weight decay
        are options of their own.
      template: the prompt, with columns of the data in braces, for text-classification or in place of the task's.
      verbalizer: the answer word of each label, in their order, blanks included; as template.
      labels: the label of each answer word, in their order, for data whose labels are text; by default alphabetical.
      column: column of the text data that names the client of each training row.
      max_length: most tokens of a prompt, longer ones keep their end; by default the task's or the model's.
      max_new_tokens: most tokens to generate; by default the task's.
      train_rows: random rows of the training data to use; by default all, for generation 1,000.
      test_rows: random rows of the test data to use; None is all, for generation 100.
      trainable: all parameters, lora, prefix, head, or a regular expression over the parameters' dotted paths.
      lora_rank: rank r of LoRA.
      lora_alpha: α of LoRA, whose product is scaled by α/r.
      lora_targets: projections that get LoRA, of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.
      prefix_tokens: learned prefix positions.
      dtype: in which the model computes; losses are float32 in any case.
      param_dtype: in which parameters are kept; bfloat16 is rounded stochastically, so that no update is lost.
    """
    from hiso_jax.tasks.text import text_data, text_task

    tuning = _tuning(trainable, lora_rank, lora_alpha, lora_targets, prefix_tokens)
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
    )
    pretrained, tuned = _language_model(name, seed, model, revision, dtype, param_dtype, tuning)
    return text_task(data, tuned, pretrained, max_length=max_length, max_new_tokens=max_new_tokens)


def _tuning(
    trainable: str, lora_rank: int, lora_alpha: float, lora_targets: tuple[str, ...], prefix_tokens: int
) -> dict[str, Any]:
    """What of a language model is trained, as ``lm.tune`` takes it.

    Raises:
      ParameterError: an option of adapters that are not asked for, or a number out of range.
    """
    given = {
        "lora_rank": lora_rank,
        "lora_alpha": lora_alpha,
        "lora_targets": tuple(lora_targets),
        "prefix_tokens": prefix_tokens,
    }
    for kind, own in (("lora", LORA), ("prefix", PREFIX)):
        for option, default in own.items():
            if trainable != kind and given[option] != default:
                raise ParameterError(option, f"has no meaning for `trainable` {trainable}")
    for option in ("lora_rank", "prefix_tokens"):
        whole(option, given[option], 1)
    positive("lora_alpha", lora_alpha)
    return {"trainable": trainable, **given}


def check_model(name: str, model: str | None) -> None:
    """Refuse, before anything is loaded, what names no language model.

    Raises:
      ParameterError: it names none, or a file or folder that is not there.
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
    tuning: dict[str, Any],
) -> tuple[Any, Any]:
    """A language model as it was pretrained, and with what of it is trained."""
    check_model(name, model)
    assert model is not None
    # Imported where they are needed: they need the extra lm.
    from hiso_jax.models import lm
    from hiso_jax.models.lm import tune

    pretrained = lm.load(model, revision=revision, dtype=dtype, param_dtype=param_dtype)
    return pretrained, tune(pretrained, seed=seed, **tuning)


def _text_shapes(
    name: str,
    *,
    model: str | None = None,
    revision: str | None = None,
    prompts: Literal["decomfl", "mezo"] = "decomfl",
    verbalizer: tuple[str, ...] | None = None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    train_rows: int | None = None,
    test_rows: int | None = None,
    trainable: str = "lora",
    lora_rank: int = 8,
    lora_alpha: float = 16.0,
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj"),
    prefix_tokens: int = 5,
    dtype: Precision = "float32",
    param_dtype: Precision = "float32",
    **rest: Any,
) -> Any:
    """A task of text with shapes in place of arrays, and its trained parameters: of the model no weights are read."""
    from hiso_jax.models import lm
    from hiso_jax.tasks.text import PROMPTS, text_shapes

    _tuning(trainable, lora_rank, lora_alpha, lora_targets, prefix_tokens)
    adapters = {
        "lora": lm.Adapters(lora_rank, lora_alpha, tuple(lora_targets)),
        "prefix": lm.Adapters(prefix=prefix_tokens),
    }.get(trainable, lm.Adapters())
    if model is None:
        raise ParameterError("model", f"must name an architecture ({', '.join(lm.SHAPES)}), a folder or a hub's model")
    if model.lower() in lm.SHAPES and not Path(model).exists():
        architecture = lm.SHAPES[model.lower()]
    else:
        check_model(name, model)
        architecture = lm.read_architecture(model, revision=revision)
    tuned = lm.tuned_shapes(lm.Decoder(architecture, dtype), trainable, adapters=adapters, param_dtype=param_dtype)
    known = PROMPTS[prompts].get(name)
    words = verbalizer or (() if known is None else known.words)
    task = text_shapes(
        name,
        tuned,
        classes=max(len(words), 2),
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        rows=(train_rows or 8192, test_rows or 1000),
    )
    return task, tuned.trained


def _text(name: str, *without: str, **changed: Any) -> Factory:
    """The factory of one task of text: :func:`text` under its name, without the options that it does not read."""

    def make(seed: int, **options: Any) -> Any:
        return text(name, seed, **options)

    def base(seed: int, key: Any, **options: Any) -> Base:
        read = {each: options.get(each, hidden[each].default) for each in (*LORA, *PREFIX)}
        tuning = _tuning(options.get("trainable", "lora"), **read)
        own = {each: options.get(each, hidden[each].default) for each in ("model", "revision", "dtype", "param_dtype")}
        pretrained, tuned = _language_model(name, seed, **own, tuning=tuning)
        return Base(tuned.trained, tuned.frozen, pretrained, tuned)

    def shapes(**options: Any) -> Any:
        return _text_shapes(name, **options)

    hidden = inspect.signature(text).parameters
    kept = [
        each.replace(default=changed.get(each.name, each.default))
        for each in hidden.values()
        if each.name != "name" and each.name not in without
    ]
    vars(make).update(
        __signature__=inspect.Signature(kept), base=base, shapes=shapes, rates=None, labelled=name in _CLASSIFIES
    )
    make.__annotations__ = {each.name: each.annotation for each in kept}
    make.__doc__, make.__name__ = text.__doc__, name
    return make


TASKS = Kind(
    "task",
    {
        "digits": _network(digits, digits_network, _digits_shapes),
        "mnist": _network(mnist, mnist_network, _mnist_shapes("mnist")),
        "fashion-mnist": _network(fashion_mnist, mnist_network, _mnist_shapes("fashion-mnist")),
        **{
            name: defaults(**TEXT_DEFAULTS, **LABELLED)(_text(name, "max_new_tokens", test_rows=200))
            for name in _CLASSIFIES[:-1]
        },
        **{
            name: defaults(**TEXT_DEFAULTS, **UNLABELLED)(_text(name, "template", "verbalizer", "labels"))
            for name in _GENERATES
        },
        "text-classification": defaults(**TEXT_DEFAULTS, **LABELLED)(
            _text("text-classification", "max_new_tokens", "prompts", test_rows=200)
        ),
    },
    ("seed",),
    "Task",
)
