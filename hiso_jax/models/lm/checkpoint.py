"""Parameters from checkpoints: safetensors by hub name or from a local folder, and GGUF files; never pickles."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.models.lm.config import LMConfig, check_size, from_transformers
from hiso_jax.models.lm.decoder import Decoder
from hiso_jax.models.lm.files import check_files, read_json
from hiso_jax.models.lm.folder import IGNORED, SafeTensors, check_kind
from hiso_jax.models.lm.hub import from_hub
from hiso_jax.models.lm.known import FAMILIES
from hiso_jax.models.lm.names import Leaf, as_ours, checkpoint_name, gguf_name, leaves, part_of
from hiso_jax.models.lm.torch_decoder import TorchDecoder, load_torch

MISSING_EXTRA = "language models need the packages of the extra lm: pip install '.[lm]' (missing: {})"


class Tensors(Protocol):
    """The named tensors of a checkpoint."""

    def names(self) -> Iterable[str]:
        """The names of all tensors."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, as stored or dequantised."""

    def size(self, name: str) -> int:
        """The number of values of a tensor, without reading it."""


@dataclass(frozen=True)
class Pretrained:
    """A language model with its weights and its tokenizer.

    Attributes:
      decoder: the model's functions.
      params: the parameters, in host memory.
      tokenizer: the tokenizer, from transformers.
      name: the argument ``model`` of :func:`load`; for a GGUF file, the file's name.
      hf_config: the contents of its config.json; None for a GGUF file.
      generation_config: the contents of its generation_config.json, or None.
      folder: where its files are; None for a GGUF file.
    """

    decoder: Decoder | TorchDecoder
    params: PyTree
    tokenizer: Any
    name: str
    hf_config: Mapping[str, Any] | None = None
    generation_config: Mapping[str, Any] | None = None
    folder: Path | None = None


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> Pretrained:
    """Load a language model by hub name, from a folder or from a GGUF file.

    Args:
      model: ``facebook/opt-125m``; a folder with config.json, tokenizer files and safetensors; or a ``.gguf`` file.
        Folders of an architecture that this library does not compute itself run by torch (extra ``torch``).
      revision: the branch, tag or commit of a hub model, by default ``main``; ``converted`` takes the pull request of
        the hub's own converter, which has the safetensors that old checkpoints lack.
      dtype: the dtype of the computation.
      param_dtype: the dtype of the stored parameters, float32 or bfloat16.

    Raises:
      ValueError: the model cannot be found or read, or its architecture, a tensor type or a shape is not supported.
    """
    check_dtype("dtype", dtype)
    check_dtype("param_dtype", param_dtype)
    path = Path(model)
    if path.suffix == ".gguf":
        from hiso_jax.models.lm.gguf import open_gguf

        with needing("gguf", "transformers", "tokenizers"):
            config, tensors, tokenizer = open_gguf(path)
        params = read_parameters(tensors, config, gguf_name(config), param_dtype, path)
        return Pretrained(Decoder(config, dtype), params, tokenizer, path.name)
    with needing("transformers", "tokenizers", "safetensors"):
        folder = path if path.is_dir() else from_hub(str(model), revision)
        check_files(folder)
        check_kind(folder)
        content = read_json(folder / "config.json")
        by_torch = content.get("model_type", "opt") not in FAMILIES
        known = None if by_torch else read_config(folder)
        tokenizer = read_tokenizer(folder)
        generation = folder / "generation_config.json"
        generating = read_json(generation) if generation.is_file() else None
        decoder: Decoder | TorchDecoder
        if known is None:
            decoder, params = load_torch(folder, content, dtype)
            params = {name: value.astype(_stored(param_dtype)) for name, value in params.items()}
        else:
            decoder, params = Decoder(known, dtype), read_safetensors(folder, known, param_dtype)
    return Pretrained(decoder, params, tokenizer, str(model), content, generating, folder)


def _stored(param_dtype: DTypeLike) -> np.dtype:
    """The dtype of NumPy of stored parameters."""
    return np.dtype(ml_dtypes.bfloat16 if jnp.dtype(param_dtype) == jnp.bfloat16 else np.float32)


def check_dtype(name: str, dtype: DTypeLike) -> None:
    """Refuse what is no floating-point dtype.

    Raises:
      ParameterError: it is none.
    """
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ParameterError(name, f"must be a floating-point dtype, float32 or bfloat16 say; got {dtype!r}")


@contextmanager
def needing(*packages: str) -> Iterator[None]:
    """Report a missing optional package of ``packages`` as a one-sentence error.

    Raises:
      ValueError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in packages:
            raise
        raise ValueError(MISSING_EXTRA.format(error.name)) from error


def read_config(folder: Path) -> LMConfig:
    """The architecture of the checkpoint in ``folder``.

    Raises:
      ValueError: the folder has no readable config.json, or the architecture is not supported.
    """
    check_kind(folder)
    content = read_json(folder / "config.json")
    if not isinstance(content.get("model_type"), str):
        raise ParameterError("model", f"must name its architecture; {folder / 'config.json'} has no model_type")
    if "num_hidden_layers" in content:
        # Before transformers, which makes lists of this length.
        check_size("layers", content["num_hidden_layers"])
    from transformers import CONFIG_MAPPING

    # transformers fills in the defaults that the file leaves out.
    known = content["model_type"] in CONFIG_MAPPING
    try:
        full = CONFIG_MAPPING[content["model_type"]].from_dict(content).to_dict() if known else {}
    except Exception as error:
        # transformers validates the entries and raises errors of many types.
        reason = " ".join(str(error).split())
        raise ParameterError("model", f"must have a valid config.json; that of {folder}: {reason}") from error
    try:
        return from_transformers({**content, **full})
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ParameterError(
            "model", f"must have a valid config.json; that of {folder} lacks or has a wrong entry ({reason})"
        ) from error


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder``.

    Raises:
      ValueError: the folder has no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except BaseException as error:
        # transformers passes on the errors of its readers. Panics of the readers in Rust are not Exceptions.
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ParameterError(
            "model", f"must come with a tokenizer; that of {folder} cannot be read ({reason})"
        ) from error


def read_safetensors(folder: Path, config: LMConfig, param_dtype: DTypeLike = jnp.float32) -> PyTree:
    """The parameters of an architecture, read from the safetensors files of a folder.

    Raises:
      ValueError: as in :func:`read_parameters`, or a file is missing or damaged.
    """
    with ExitStack() as files:
        return read_parameters(SafeTensors(folder, files), config, checkpoint_name(config), param_dtype, folder)


def read_parameters(
    tensors: Tensors,
    config: LMConfig,
    called: Callable[[str, int | None], str],
    param_dtype: DTypeLike,
    source: Path,
) -> PyTree:
    """The parameters of an architecture, read from a checkpoint's tensors.

    Args:
      tensors: the checkpoint's tensors.
      config: the architecture.
      called: (our name, layer or None) → the name in the checkpoint.
      param_dtype: float32 or bfloat16.
      source: the path of the checkpoint, for error messages.

    Raises:
      ValueError: a tensor is missing, has another shape, has values that are not finite, or has no place in the
        architecture.
    """
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0))
    left = {name for name in tensors.names() if not name.endswith(IGNORED)}
    if config.tied:
        left.discard(called("lm_head.kernel", None))

    # Sizes are checked before anything is allocated, because a configuration may claim any size.
    for leaf in leaves(shapes):
        for layer in [None] if leaf.layers is None else range(leaf.layers):
            name, part = called(leaf.name, layer), part_of(config, leaf.name)
            if name not in left:
                raise ValueError(f"{source} lacks the tensor {name}, which its architecture needs")
            shape = leaf.shape if part is None else (leaf.shape[0], part.rows)
            if tensors.size(name) != math.prod(shape):
                raise ValueError(
                    f"{source}: tensor {name} has {tensors.size(name):,} numbers where the architecture has "
                    f"{math.prod(shape):,}, of shape {shape} (as input × output)"
                )

    def read(leaf: Leaf, layer: int | None) -> np.ndarray:
        name, part = called(leaf.name, layer), part_of(config, leaf.name)
        left.discard(name)
        tensor = as_ours(leaf.name, tensors.read(name) if part is None else tensors.read(name)[part.start : part.stop])
        if tensor.shape != leaf.shape:
            raise ValueError(
                f"{source}: tensor {name} has shape {tensor.shape} (as input × output) where the architecture has "
                f"{leaf.shape}"
            )
        if not np.isfinite(tensor).all():
            raise ValueError(
                f"{source}: tensor {name} has numbers that are not finite, as a faulty conversion to float16 leaves "
                "them: every loss of this model would be NaN"
            )
        return tensor

    dtype = _stored(param_dtype)
    arrays = []
    for leaf in leaves(shapes):
        if leaf.layers is None:
            arrays.append(np.array(read(leaf, None), dtype, order="C"))
            continue
        array = np.empty((leaf.layers, *leaf.shape), dtype)
        for layer in range(leaf.layers):
            array[layer] = read(leaf, layer)
        arrays.append(array)
    if left:
        raise ValueError(
            f"{source} has tensors that its architecture does not know: {', '.join(sorted(left)[:3])}"
            f"{f' and {len(left) - 3} more' if len(left) > 3 else ''}"
        )
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays)
