"""Low-rank adapters as a folder that PEFT loads on top of the base model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.models.lm.checkpoint import Pretrained, needing
from hiso_jax.models.lm.modules import Adapters
from hiso_jax.models.lm.names import JOINED, checkpoint_name, leaves
from hiso_jax.models.lm.torch_decoder import TorchDecoder
from hiso_jax.models.lm.trainable import Tuned
from hiso_jax.paths import as_path

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapters(pretrained: Pretrained, tuned: Tuned, trained: PyTree, folder: Path | str) -> list[Path]:
    """Write low-rank adapters in the format of PEFT (adapter_config.json and adapter_model.safetensors).

    The folder holds A and B alone: ``peft.PeftModel.from_pretrained(base, folder)`` adds B·A·α/r to the kernels.

    Args:
      pretrained: the model before fine-tuning.
      tuned: the model with adapters, from :func:`hiso_jax.models.lm.tune` with ``"lora"``.
      trained: the trained parameters.
      folder: the output folder, made if it does not exist.

    Returns:
      The weight file.

    Raises:
      ParameterError: the model has no low-rank adapters.
      OSError: the folder cannot be written.
    """
    check_adapters(tuned)
    folder, adapters, decoder = as_path("folder", folder), tuned.decoder.adapters, tuned.decoder
    if isinstance(decoder, TorchDecoder):
        return _write(folder, pretrained, adapters, _torch_tensors(trained), dict(decoder.kernels))
    called, tensors = checkpoint_name(decoder.config), {}
    for leaf, array in zip(leaves(trained), map(np.asarray, jax.tree.leaves(trained)), strict=True):
        module, _, side = leaf.name.rpartition(".lora_")
        for layer in range(leaf.layers or 0):
            # Their matrices are outputs × inputs.
            stem = called(f"{module}.kernel", layer).removesuffix(".weight")
            tensors[f"base_model.model.{stem}.lora_{side.upper()}.weight"] = np.ascontiguousarray(array[layer].T)
    return _write(folder, pretrained, adapters, tensors, {})


def _torch_tensors(trained: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Adapters of a torch module under PEFT's names, outputs × inputs."""
    found = {}
    for name, value in trained.items():
        module, _, side = name.rpartition(".lora_")
        found[f"base_model.model.{module}.lora_{side.upper()}.weight"] = np.ascontiguousarray(np.asarray(value).T)
    return found


def _write(
    folder: Path,
    pretrained: Pretrained,
    adapters: Adapters,
    tensors: dict[str, np.ndarray],
    kernels: Mapping[str, bool],
) -> list[Path]:
    """The two files of PEFT's format; ``kernels`` are those of a torch module."""
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": pretrained.name,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        # Whether weights are stored as inputs × outputs.
        "fan_in_fan_out": any(plain for name, plain in kernels.items() if name.split(".")[-2] in targets),
        "inference_mode": True,
        "target_modules": targets,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    with needing("safetensors"):
        from safetensors.numpy import save_file

        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return [folder / WEIGHTS]


def check_adapters(tuned: Tuned) -> None:
    """Refuse a model without low-rank adapters.

    Raises:
      ParameterError: it has none, or they are of projections that the base model joins with others.
    """
    if not tuned.decoder.adapters.rank:
        raise ParameterError(
            "format", "must be hf or delta for a run without --trainable lora: PEFT's format is for low-rank adapters"
        )
    joined = [name for name in tuned.decoder.adapters.targets if name in sum(JOINED, ())]
    if tuned.decoder.config.family == "phi3" and joined:
        raise ParameterError(
            "format",
            f"must be hf or delta for adapters of {', '.join(joined)} in a Phi-3: transformers joins these projections "
            "with others, and PEFT's adapters are for whole projections",
        )
