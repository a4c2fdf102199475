"""Causal language models whose architecture :class:`Decoder` does not know, run by torchax through ``transformers``."""

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from hiso_jax.checks import ParameterError, first_line, positive
from hiso_jax.models.lm.config import SIZES, check_size
from hiso_jax.models.lm.known import FAMILIES
from hiso_jax.models.lm.modules import NO_ADAPTERS, Adapters

# What the families call the length of their context.
LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len", "n_ctx")


@dataclass(frozen=True)
class TorchConfig:
    """What this library needs to know of an architecture that it does not compute itself.

    Attributes:
      family: transformers' ``model_type``.
      vocab_size: V.
      max_positions: the longest sequence.
    """

    family: str
    vocab_size: int
    max_positions: int


@dataclass(frozen=True)
class TorchDecoder:
    """A causal language model of ``transformers`` as pure functions, with the interface of :class:`Decoder`.

    The parameters are a flat dict of arrays by their names in torch. A "hidden state" is the logits themselves,
    because torch modules differ in where their head begins. There is no cache of keys and values: each generated token
    costs a pass over the entire text.

    Attributes:
      config: the sizes of the model.
      apply: (parameters, inputs by name) → logits.
      takes: the inputs that the model takes.
      kernels: the names of the weights that LoRA may be added to, and whether each is stored as inputs × outputs.
      dtype: the dtype of the computation.
      adapters: the adapters of its weights.
    """

    config: TorchConfig
    apply: Callable[[Mapping[str, Array], Mapping[str, Any]], Array]
    takes: frozenset[str]
    kernels: tuple[tuple[str, bool], ...]
    dtype: Any = jnp.float32
    adapters: Adapters = NO_ADAPTERS

    @staticmethod
    def perturbed_as(name: str) -> None:
        """Torch reads arrays, so that every perturbed parameter is made whole."""

    @staticmethod
    def layout(name: str, shape: tuple[int, ...], shards: int) -> None:
        """Every device holds all parameters."""

    def hidden(
        self,
        params: Mapping[str, Array],
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
        *,
        last: int | None = None,
    ) -> Float[Array, "B N V"]:
        """The logits of the last N positions, by default of all, float32."""
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        given: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask.astype(jnp.int32)}
        if "position_ids" in self.takes:
            given["position_ids"] = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0).astype(jnp.int32)
        if last is not None and "logits_to_keep" in self.takes:
            given["logits_to_keep"] = last
        plain = jax.tree.map(lambda a: a.astype(self.dtype), self._folded(params))
        logits = self.apply(plain, given)
        return (logits if last is None else logits[:, -last:]).astype(jnp.float32)

    def logits(
        self, params: PyTree, hidden: Float[Array, "... V"], columns: Int[Array, "W"] | None = None
    ) -> Float[Array, "... W"]:
        """The logits of the tokens ``columns``, by default of all."""
        return hidden if columns is None else hidden[..., columns]

    def prefill(
        self, params: PyTree, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], room: int
    ) -> tuple[Float[Array, "B V"], Int[Array, "B S"]]:
        """The logits after left-padded prompts, and the tokens with room for ``room`` more."""
        return self.hidden(params, tokens, mask, last=1)[:, 0], jnp.pad(tokens, ((0, 0), (0, room)))

    def decode(
        self,
        params: PyTree,
        token: Int[Array, "B"],
        mask: Bool[Array, "B S"],
        cache: Int[Array, "B S"],
        at: Int[Array, ""],
    ) -> tuple[Float[Array, "B V"], Int[Array, "B S"]]:
        """The logits after one more token at index ``at``, and the tokens with it."""
        cache = cache.at[:, at].set(token)
        # The new token becomes the last; the room behind it becomes padding in front.
        turn = cache.shape[1] - 1 - at
        rolled, real = jnp.roll(cache, turn, 1), jnp.roll(mask, turn, 1)
        return self.hidden(params, rolled, real, last=1)[:, 0], cache

    def _folded(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """The parameters with every low-rank product added to its weight."""
        return with_products(params, dict(self.kernels), self.adapters)


def with_products(params: Mapping[str, Any], kernels: Mapping[str, bool], adapters: Adapters) -> dict[str, Any]:
    """The parameters with low-rank products added: W + (A·B)·α/r, transposed where W is outputs × inputs."""
    if not adapters.rank:
        return dict(params)
    scale, found = adapters.alpha / adapters.rank, {}
    for name, value in params.items():
        if ".lora_" in name:
            continue
        module = name.removesuffix(".weight")
        if f"{module}.lora_a" in params:
            product = scale * (params[f"{module}.lora_a"] @ params[f"{module}.lora_b"])
            value = value + (product if kernels[name] else product.T).astype(value.dtype)
        found[name] = value
    return found


def load_torch(
    folder: Path, content: Mapping[str, Any], dtype: DTypeLike
) -> tuple[TorchDecoder, dict[str, np.ndarray]]:
    """A causal language model of ``transformers`` in a folder, and its parameters as float32.

    Args:
      folder: the folder, with config.json and safetensors.
      content: the contents of its config.json.
      dtype: the dtype of the computation.

    Raises:
      ParameterError: the extra ``torch`` is not installed; ``transformers`` has no causal language model of this
        architecture, or cannot read the folder; or a parameter is not finite.
    """
    from hiso_jax.models.torch import from_torch, libraries

    try:
        torch = libraries()[0]
    except ParameterError as error:
        raise ParameterError(
            "model",
            f"must be of the architectures {', '.join(FAMILIES)}, or the extra torch be installed for others "
            f"(pip install '.[torch]'); got {content['model_type']}",
        ) from error
    module = _module(folder, content, torch)
    model = from_torch(module)
    takes = frozenset(inspect.signature(module.forward).parameters)
    config = TorchConfig(content["model_type"], *_sizes(module.config, folder))
    params = {name: np.asarray(value, np.float32) for name, value in model.init(jax.random.key(0)).items()}
    for name, value in params.items():
        if not np.isfinite(value).all():
            raise ValueError(f"{folder}: tensor {name} has numbers that are not finite: every loss would be NaN")
    return TorchDecoder(config, model.apply, takes, tuple(_kernels(module, params, torch)), dtype), params


def _module(folder: Path, content: Mapping[str, Any], torch: Any) -> Any:
    """The module in a folder, in float32; code from the folder is not run.

    Raises:
      ParameterError: transformers does not know the architecture as a causal language model, or cannot read it.
    """
    from transformers import AutoModelForCausalLM

    if content.get("is_encoder_decoder") or content.get("quantization_config"):
        raise ParameterError(
            "model",
            f"must be a causal language model with plain weights; {folder} is "
            f"{'an encoder with a decoder' if content.get('is_encoder_decoder') else 'quantised'}",
        )
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:
        # transformers raises errors of many types.
        raise ParameterError(
            "model",
            f"must be a causal language model that transformers reads; {content.get('model_type')} in {folder} is not "
            f"({first_line(error)[:300]}): other modules are tasks of your own, see docs/guides/torch.md",
        ) from error


def _sizes(config: Any, folder: Path) -> tuple[int, int]:
    """V and the longest sequence; models without a limit, with relative positions say, get the largest one allowed.

    Raises:
      ParameterError: a size is no model's.
    """
    length = next((getattr(config, name) for name in LENGTHS if getattr(config, name, None)), SIZES["max_positions"])
    check_size("vocab_size", config.vocab_size)
    check_size("max_positions", length)
    return config.vocab_size, length


def _kernels(module: Any, params: Iterable[str], torch: Any) -> Iterable[tuple[str, bool]]:
    """The weights of linear layers but the head, and whether each is stored as inputs × outputs."""
    from transformers.pytorch_utils import Conv1D

    head = module.get_output_embeddings()
    for name, each in module.named_modules():
        if isinstance(each, torch.nn.Linear | Conv1D) and each is not head and f"{name}.weight" in params:
            yield f"{name}.weight", isinstance(each, Conv1D)


def chosen_of(decoder: TorchDecoder, trainable: str) -> None:
    """Refuse a choice that needs to know the architecture.

    Raises:
      ParameterError: ``trainable`` is prefix or head.
    """
    if trainable in ("prefix", "head"):
        raise ParameterError(
            "trainable",
            f"must be all, lora or a pattern of names for {decoder.config.family}, which runs by torch; got "
            f"{trainable}",
        )


def with_adapters(
    decoder: TorchDecoder, params: Mapping[str, Any], adapters: Adapters, key: jax.Array
) -> tuple[TorchDecoder, dict[str, np.ndarray]]:
    """The decoder with low-rank adapters, and their initial values: A random, B zero.

    Raises:
      ParameterError: the rank or α is out of range, or the model has no such projection.
    """
    positive("lora_alpha", adapters.alpha)
    ends = sorted({name.split(".")[-2] for name, _ in decoder.kernels})
    for target in adapters.targets or ("",):
        if target not in ends:
            raise ParameterError(
                "lora_targets", f"must be of {', '.join(ends)} for {decoder.config.family}; got {target or 'none'}"
            )
    draw, added = jax.nn.initializers.he_uniform(), {}
    for number, (name, plain) in enumerate(decoder.kernels):
        if name.split(".")[-2] not in adapters.targets:
            continue
        inputs, outputs = params[name].shape if plain else params[name].shape[::-1]
        if not 1 <= adapters.rank <= min(inputs, outputs):
            raise ParameterError(
                "lora_rank", f"must be at least 1 and at most {min(inputs, outputs)}, got {adapters.rank}"
            )
        module = name.removesuffix(".weight")
        own = jax.random.fold_in(key, number)
        added[f"{module}.lora_a"] = np.asarray(draw(own, (inputs, adapters.rank), jnp.float32))
        added[f"{module}.lora_b"] = np.zeros((adapters.rank, outputs), np.float32)
    return replace(decoder, adapters=adapters), added


def save_torch(source: Path, decoder: TorchDecoder, params: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a folder that transformers loads: the model of ``source`` with other parameters.

    Args:
      source: the folder of the model before fine-tuning.
      decoder: the model's functions.
      params: its parameters, with adapters if it has any.
      folder: the output folder.

    Returns:
      The weight files.
    """
    from hiso_jax.models.torch import libraries

    torch = libraries()[0]
    module = _module(source, json.loads((source / "config.json").read_text(encoding="utf-8")), torch)
    whole = with_products(params, dict(decoder.kernels), decoder.adapters)
    # Names of tied weights that are not among the parameters follow those that are.
    module.load_state_dict({name: torch.as_tensor(np.asarray(value)) for name, value in whole.items()}, strict=False)
    module.save_pretrained(folder)
    return sorted(folder.glob("*.safetensors"))
