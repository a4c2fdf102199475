"""Layouts: how parameters are split along the mesh axis ``model``, as the model says or along their longest axis."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from hiso_jax.fed.devices.mesh import MODEL
from hiso_jax.stacked import Stacked, is_stacked, path_name

Layout = Callable[[str, tuple[int, ...], int], int | None]
"""(dotted name of a parameter, its shape without an axis of layers, shards) → the axis to split, or None to repeat."""


def longest_axis(name: str, shape: tuple[int, ...], shards: int) -> int | None:
    """The longest axis that ``shards`` divides, the first of equals: the layout of models that define none."""
    divisible = [axis for axis, length in enumerate(shape) if length and length % shards == 0]
    return max(divisible, key=lambda axis: shape[axis]) if divisible else None


def param_shardings(mesh: Mesh, params: PyTree, layout: Layout = longest_axis) -> PyTree:
    """The sharding of each parameter.

    Args:
      mesh: the mesh; without an axis ``model`` every parameter is repeated.
      params: the parameters; only shapes and paths are read.
      layout: the layout of the parameters.
    """
    shards = mesh.shape.get(MODEL, 1)

    def sharding(name: str, shape: tuple[int, ...], layers: int) -> NamedSharding:
        axis = None if shards == 1 else layout(name, shape[layers:], shards)
        if axis is None:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, PartitionSpec(*[None] * (layers + axis), MODEL))

    def of(path: tuple[Any, ...], node: Any) -> PyTree:
        if not isinstance(node, Stacked):
            return sharding(path_name(path), jnp.shape(node), 0)
        return jax.tree_util.tree_map_with_path(
            lambda inner, leaf: sharding(path_name((*path, *inner)), jnp.shape(leaf), 1), node
        )

    return jax.tree_util.tree_map_with_path(of, params, is_leaf=is_stacked)


def state_shardings(mesh: Mesh, params: PyTree, state: PyTree, layout: Layout = longest_axis) -> PyTree:
    """The shardings of an optimizer's state: subtrees with the parameters' structure and shapes are split like them."""
    structure, shardings = jax.tree.structure(params), param_shardings(mesh, params, layout)
    shapes = [jnp.shape(x) for x in jax.tree.leaves(params)]

    def is_like_params(node: Any) -> bool:
        leaves, own_structure = jax.tree.flatten(node)
        same = own_structure == structure  # type: ignore[operator]
        return same and [jnp.shape(x) for x in leaves] == shapes

    def of(node: Any) -> PyTree:
        if is_like_params(node):
            return shardings
        return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), node)

    return jax.tree.map(of, state, is_leaf=is_like_params)
