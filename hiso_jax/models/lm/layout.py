"""The split of a language model over devices: Megatron's layout (Shoeybi et al., arXiv 1909.08053).

Queries, keys, values and the first products of the feed-forward network are split by columns, the products that follow
by rows, so a layer needs two sums across the devices. Norms are replicated, and so are parameters whose split would cut
a head in two.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, PyTree

from hiso_jax.models.lm.config import LMConfig
from hiso_jax.stacked import path_name

# The mesh axis over which parameters are split.
AXIS = "model"
COLUMNS = ("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj")
ROWS = ("o_proj", "down_proj")
PREFIXES = ("prefix_keys", "prefix_values")


def placed(config: LMConfig, params: PyTree) -> PyTree:
    """A layer's parameters, or others without layers, constrained to the layout; unchanged on one device.

    The parameters may be perturbed, and XLA's partitioner then does not know how they are split. The partitioner for
    TPUs makes one array of equal constants of the same shape, and splits all arrays that they meet alike: queries like
    outputs, norms like biases. Without the constraint every norm was a sum across the devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, zip(mesh.axis_types, mesh.axis_sizes, strict=True), strict=True))
    kind, shards = kinds.get(AXIS, (None, 1))
    if kind != AxisType.Auto or shards == 1:
        return params

    def one(path: tuple[Any, ...], leaf: Array) -> Array:
        if not leaf.ndim:  # the scale of a perturbed parameter
            return leaf
        axis = _axis(config, path_name(path), leaf.shape, shards)
        spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)
        return jax.lax.with_sharding_constraint(leaf, spec)

    return jax.tree_util.tree_map_with_path(one, params)


def layout_of(config: LMConfig) -> Callable[[str, tuple[int, ...], int], int | None]:
    """A function (dotted name, shape without the axis of layers, shards) → the axis to split, None to replicate."""
    return partial(_axis, config)


def _axis(config: LMConfig, name: str, shape: tuple[int, ...], shards: int) -> int | None:
    *_, module, kind = ("", *name.split("."))
    # The number of units along the split axis: heads, or hidden units of the feed-forward network.
    units = {"q_proj": config.heads, "o_proj": config.heads, "k_proj": config.kv_heads, "v_proj": config.kv_heads}
    if module in COLUMNS + ROWS:
        if units.get(module, config.mlp_size) % shards:
            return None
        if module in ROWS:
            return 0 if kind in ("kernel", "lora_a") else None
        # Biases are small. They are replicated like the norms, because they have the same shape: see ``placed``.
        return len(shape) - 1 if kind in ("kernel", "lora_b") else None
    if kind in PREFIXES:
        return None if config.kv_heads % shards else 1
    if module == "embed_tokens":
        return None if config.vocab_size % shards else 0
    if module == "lm_head":
        return None if config.vocab_size % shards else 1
    # Norms, position tables, projections to and from a narrower embedding.
    return None
