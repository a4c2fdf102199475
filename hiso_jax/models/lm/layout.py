"""How a language model is split over devices: Megatron's layout (Shoeybi et al., arXiv 1909.08053).

Queries, keys, values and the first products of the feed-forward network are split by columns, the products that follow
by rows, so that a layer needs two sums across the devices; norms are repeated, and so is what would cut a head in two.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, PyTree

from hiso_jax.models.lm.config import LMConfig
from hiso_jax.stacked import path_name

# The axis of a mesh along which parameters are split.
AXIS = "model"
COLUMNS = ("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj")
ROWS = ("o_proj", "down_proj")
PREFIXES = ("prefix_keys", "prefix_values")


def placed(config: LMConfig, params: PyTree) -> PyTree:
    """A layer's parameters, or others without layers, told to be split as the layout says; on one device as they are.

    They may be perturbed, and nothing then tells XLA's partitioner how they are split: that for TPUs makes one array of
    equal constants of a shape and splits whatever they meet alike, queries as outputs and norms as biases, so that
    every norm was a sum across the devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, zip(mesh.axis_types, mesh.axis_sizes, strict=True), strict=True))
    kind, shards = kinds.get(AXIS, (None, 1))
    if kind != AxisType.Auto or shards == 1:
        return params

    def one(path: tuple[Any, ...], leaf: Array) -> Array:
        if not leaf.ndim:  # how far a parameter is moved
            return leaf
        axis = _axis(config, path_name(path), leaf.shape, shards)
        spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)
        return jax.lax.with_sharding_constraint(leaf, spec)

    return jax.tree_util.tree_map_with_path(one, params)


def layout_of(config: LMConfig) -> Callable[[str, tuple[int, ...], int], int | None]:
    """(a parameter's dotted name, its shape without the axis of layers, shards) → the axis to split, None to repeat."""
    return partial(_axis, config)


def _axis(config: LMConfig, name: str, shape: tuple[int, ...], shards: int) -> int | None:
    *_, module, kind = ("", *name.split("."))
    # What goes along the axis that would be split: heads, or units of the feed-forward network.
    units = {"q_proj": config.heads, "o_proj": config.heads, "k_proj": config.kv_heads, "v_proj": config.kv_heads}
    if module in COLUMNS + ROWS:
        if units.get(module, config.mlp_size) % shards:
            return None
        if module in ROWS:
            return 0 if kind in ("kernel", "lora_a") else None
        # Biases are small, and repeated like the norms, of which they have the shape: see ``placed``.
        return len(shape) - 1 if kind in ("kernel", "lora_b") else None
    if kind in PREFIXES:
        return None if config.kv_heads % shards else 1
    if module == "embed_tokens":
        return None if config.vocab_size % shards else 0
    if module == "lm_head":
        return None if config.vocab_size % shards else 1
    # Norms, tables of positions, projections to and from a narrower embedding.
    return None
