"""The names of parameters in checkpoints: Hugging Face's OPT, Llama and Gemma families, and GGUF's."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

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
GEMMA_PARTS = {
    "attention_norm": "input_layernorm",
    "attention_output_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
# Phi-3 joins the rows of these projections.
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
PHI3_PARTS = {
    **LLAMA_PARTS,
    **{f"self_attn.{name}": "self_attn.qkv_proj" for name in JOINED[0]},
    **{f"mlp.{name}": "mlp.gate_up_proj" for name in JOINED[1]},
}
GGUF_PARTS = {
    "attention_norm": "attn_norm",
    "attention_output_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp_output_norm": "post_ffw_norm",
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
GGUF_PHI3_PARTS = {
    **GGUF_PARTS,
    **{f"self_attn.{name}": "attn_qkv" for name in JOINED[0]},
    "mlp.gate_proj": "ffn_up",
}
GGUF_TOP = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def _translate(name: str, parts: Mapping[str, str]) -> str:
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
    return _named_as(LLAMA_PARTS, name, layer)


def _named_as(parts: Mapping[str, str], name: str, layer: int | None) -> str:
    if name.startswith("lm_head"):
        return "lm_head.weight"
    if layer is None:
        return "model." + _endings(name)
    return f"model.layers.{layer}." + _translate(name.removeprefix("layers."), parts)


def gguf_name(config: LMConfig) -> Callable[[str, int | None], str]:
    """The function (our name, layer or None) → the name in a GGUF file of this architecture."""
    parts = GGUF_PHI3_PARTS if config.family == "phi3" else GGUF_PARTS

    def called(name: str, layer: int | None) -> str:
        if layer is None:
            top, ending = name.split(".")
            return _endings(f"{GGUF_TOP[top]}.{ending}")
        return f"blk.{layer}." + _translate(name.removeprefix("layers."), parts)

    return called


def checkpoint_name(config: LMConfig) -> Callable[[str, int | None], str]:
    """The function (our name, layer or None) → the name in a Hugging Face checkpoint of this architecture."""
    if config.family == "opt":
        return opt_name
    parts = {"gemma2": GEMMA_PARTS, "gemma3": GEMMA_PARTS, "phi3": PHI3_PARTS}.get(config.family, LLAMA_PARTS)
    return partial(_named_as, parts)


@dataclass(frozen=True)
class Part:
    """The rows of a checkpoint's tensor that hold one parameter, where the tensor joins several (Phi-3).

    Attributes:
      start, stop: the first row and the row after the last.
      rows: all rows of the tensor.
    """

    start: int
    stop: int
    rows: int


def part_of(config: LMConfig, name: str) -> Part | None:
    """Which rows of its tensor a parameter is; None where a tensor is one parameter."""
    if config.family != "phi3":
        return None
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    for modules, sizes in zip(JOINED, ((queries, keys, keys), (config.mlp_size,) * 2), strict=True):
        for index, module in enumerate(modules):
            if name.endswith(f".{module}.kernel"):
                start = sum(sizes[:index])
                return Part(start, start + sizes[index], sum(sizes))
    return None


def as_ours(name: str, tensor: np.ndarray) -> np.ndarray:
    """A checkpoint's tensor in our layout: kernels are output × input in checkpoints, input × output here."""
    return tensor.T if name.endswith(".kernel") else tensor


def as_theirs(name: str, tensor: np.ndarray) -> np.ndarray:
    """Our tensor in a checkpoint's layout."""
    return tensor.T if name.endswith(".kernel") else tensor
