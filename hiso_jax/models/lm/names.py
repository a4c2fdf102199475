"""The names of parameters in checkpoints: Hugging Face's OPT and Llama families, and GGUF's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import PyTree

from hiso_jax.models.lm.config import LMConfig
from hiso_jax.stacked import Stacked, path_name


@dataclass(frozen=True)
class Leaf:
    """One parameter of a model.

    Attributes:
      name: the dotted path.
      shape: the shape without the axis of layers.
      layers: L if the parameter is stacked, else None.
    """

    name: str
    shape: tuple[int, ...]
    layers: int | None


def leaves(shapes: PyTree) -> Iterator[Leaf]:
    """Every parameter of a tree of shapes, in the order of ``jax.tree.leaves``."""
    stacked = {name for name, node in shapes.items() if isinstance(node, Stacked)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = path_name(path)
        if name.split(".")[0] in stacked:
            yield Leaf(name, leaf.shape[1:], leaf.shape[0])
        else:
            yield Leaf(name, leaf.shape, None)


def _endings(name: str) -> str:
    return name.replace(".kernel", ".weight").replace(".scale", ".weight").replace(".embedding", ".weight")


OPT_PARTS = {
    "attention_norm": "self_attn_layer_norm",
    "mlp_norm": "final_layer_norm",
    "self_attn.o_proj": "self_attn.out_proj",
    "mlp.up_proj": "fc1",
    "mlp.down_proj": "fc2",
}
LLAMA_PARTS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
GGUF_PARTS = {
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGUF_TOP = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def _translate(name: str, parts: dict[str, str]) -> str:
    for ours, theirs in parts.items():
        name = name.replace(ours, theirs)
    return _endings(name)


def opt_name(name: str, layer: int | None) -> str:
    """The name in a Hugging Face OPT checkpoint."""
    if name.startswith("lm_head"):
        return "lm_head.weight"
    if layer is None:
        return "model.decoder." + _endings("final_layer_norm" + name[4:] if name.startswith("norm.") else name)
    return f"model.decoder.layers.{layer}." + _translate(name.removeprefix("layers."), OPT_PARTS)


def llama_name(name: str, layer: int | None) -> str:
    """The name in a Hugging Face Llama, Mistral, Qwen or SmolLM checkpoint."""
    if name.startswith("lm_head"):
        return "lm_head.weight"
    if layer is None:
        return "model." + _endings(name)
    return f"model.layers.{layer}." + _translate(name.removeprefix("layers."), LLAMA_PARTS)


def gguf_name(name: str, layer: int | None) -> str:
    """The name in a GGUF file of the Llama family."""
    if layer is None:
        top, ending = name.split(".")
        return _endings(f"{GGUF_TOP[top]}.{ending}")
    return f"blk.{layer}." + _translate(name.removeprefix("layers."), GGUF_PARTS)


def checkpoint_name(config: LMConfig) -> Callable[[str, int | None], str]:
    """The function (our name, layer or None) → the name in a Hugging Face checkpoint of this architecture."""
    return opt_name if config.family == "opt" else llama_name


def as_ours(name: str, tensor: np.ndarray) -> np.ndarray:
    """A checkpoint's tensor in our layout: kernels are output × input in checkpoints, input × output here."""
    return tensor.T if name.endswith(".kernel") else tensor


def as_theirs(name: str, tensor: np.ndarray) -> np.ndarray:
    """Our tensor in a checkpoint's layout."""
    return tensor.T if name.endswith(".kernel") else tensor
