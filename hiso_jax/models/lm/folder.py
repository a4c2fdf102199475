"""A checkpoint's folder: its kind, and the tensors in its safetensors files."""

import math
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from hiso_jax.checks import ParameterError
from hiso_jax.models.lm.files import read_json

# The types of plain weights. Other types are parts of quantised weights, which only have a meaning together.
PLAIN = ("F64", "F32", "F16", "BF16")
# Parts of tensor names, and the kind of quantised checkpoint that has them.
QUANTISED = {
    ".qweight": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".quant_state": "bitsandbytes",
    ".weight_scale_inv": "float8 with scales",
    ".weight_scale": "compressed-tensors",
    ".weight_packed": "compressed-tensors",
}
# Suffixes of weight files.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
# The types of masks and positions, buffers that some checkpoints keep.
BUFFERS = ("BOOL", "I64")
# Prefixes of files with other forms of the same checkpoint: Meta's and Mistral's own, and adapters.
BESIDE = ("consolidated", "adapter_model", "original")
# Buffers that some checkpoints keep and no architecture reads.
IGNORED = (
    "rotary_emb.inv_freq", "position_ids", "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
)  # fmt: skip


def check_kind(folder: Path) -> None:
    """Refuse a folder that is not a complete checkpoint.

    Raises:
      ValueError: the folder is a PEFT adapter without a model.
    """
    is_integer = (folder / "config.json").is_file() and bool(_own_files(folder))
    if (folder / "adapter_config.json").is_file() and not is_integer:
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path", "another model")
        raise ParameterError(
            "model",
            f"must be a complete checkpoint; {folder} is an adapter of PEFT for {base}: merge the two first "
            "(merge_and_unload) and save the model",
        )


class SafeTensors:
    """The tensors in the safetensors files of a folder."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        """Open the safetensors files; ``files`` closes them.

        Raises:
          ValueError: the folder has no safetensors files, or a shard is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        index = folder / "model.safetensors.index.json"
        try:
            parts = list(dict.fromkeys(read_json(index)["weight_map"].values())) if index.is_file() else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} cannot be read: {error}") from error
        for part in parts or ():
            if not isinstance(part, str) or Path(part).name != part or part in ("", ".", ".."):
                raise ValueError(f"{index} must name files of its own folder, got {part!r}")
        whole = folder / "model.safetensors"
        paths = [folder / part for part in parts] if parts else [whole] if whole.is_file() else _own_files(folder)
        if not paths:
            raise ParameterError("model", f"must have safetensors files; {folder} has {_others(folder)}")
        self._where: dict[str, Any] = {}
        for path in paths:
            try:
                file = files.enter_context(safe_open(path, framework="numpy"))
            except FileNotFoundError:
                raise ValueError(f"{folder} lacks {path.name}, which its index names") from None
            except (SafetensorError, OSError) as error:
                if (
                    path.is_file()
                    and path.stat().st_size < 1024
                    and path.read_bytes().startswith(b"version https://git")
                ):
                    raise ValueError(f"{path} is a pointer of Git LFS: fetch the file itself (git lfs pull)") from error
                raise ValueError(f"{path} is truncated or damaged: {error}") from error
            self._where |= dict.fromkeys(file.keys(), file)
        self._check_kinds(folder)

    def _check_kinds(self, folder: Path) -> None:
        """Refuse weights that are not plain floats, before any tensor is read.

        Raises:
          ValueError: a tensor has another type, or belongs to a quantised checkpoint, whose kind the message names.
        """
        for name, file in self._where.items():
            method = next((method for end, method in QUANTISED.items() if end in f".{name}"), None)
            if method is not None:
                raise ParameterError(
                    "model",
                    f"must have weights that are not quantised; {folder} is of {method} ({name}): take the "
                    "checkpoint that it was made of, or a GGUF file",
                )
            kind = file.get_slice(name).get_dtype()
            if kind not in (*PLAIN, *BUFFERS) and not name.endswith(IGNORED):
                raise ParameterError(
                    "model",
                    f"must have weights of {', '.join(PLAIN)}; {folder} has {name} in {kind}, as quantised "
                    "checkpoints do: take the one that it was made of, or a GGUF file",
                )

    def names(self) -> Iterable[str]:
        """The names of all tensors, with the prefix ``model.``, which checkpoints of bare models lack."""
        return [self._full(name) for name in self._where]

    @staticmethod
    def _full(name: str) -> str:
        return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"

    def read(self, name: str) -> np.ndarray:
        """One tensor, as stored."""
        stored = self._stored(name)
        return self._where[stored].get_tensor(stored)

    def size(self, name: str) -> int:
        """The number of values of a tensor, without reading it."""
        stored = self._stored(name)
        return math.prod(self._where[stored].get_slice(stored).get_shape())

    def _stored(self, name: str) -> str:
        return name if name in self._where else name.removeprefix("model.")


def _own_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder without an index, except other forms of the same checkpoint."""
    return [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith(BESIDE)]


def _others(folder: Path) -> str:
    """A description of the weight files in a folder without safetensors files."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in WEIGHTS)
    pickles = any(name.endswith((".bin", ".pt", ".pth")) for name in names)
    hint = ", pickles, which are not read (save_pretrained writes safetensors)" if pickles else ""
    return f"{', '.join(names[:3])}{hint}" if names else "none"
