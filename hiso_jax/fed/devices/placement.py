"""The placement of a run's arrays: on one device, over a mesh, or as shapes on devices that are only described."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from hiso_jax.fed.devices.layout import Layout, longest_axis, param_shardings, state_shardings
from hiso_jax.fed.devices.mesh import put, replicated_shardings, to_host
from hiso_jax.fed.devices.prng_keys import from_key_data, is_key, key_data


def owned(tree: PyTree) -> PyTree:
    """A copy of ``tree``, made leaf by leaf, for programs that reuse the memory of their arguments."""
    leaves, structure = jax.tree.flatten(tree)
    del tree
    for number, leaf in enumerate(leaves):
        leaves[number] = from_key_data(jnp.array(key_data(leaf), copy=True), leaf)
    return jax.tree.unflatten(structure, leaves)


class Placement:
    """The placement of arrays on one device or a mesh.

    Attributes:
      mesh: the devices, or None for one device.
      layout: the layout of the parameters on the mesh.
    """

    def __init__(self, mesh: Mesh | None, layout: Layout = longest_axis) -> None:
        """``mesh`` must have passed :func:`~hiso_jax.fed.devices.check_mesh`; ``layout`` splits parameters over it."""
        self.mesh, self.layout = mesh, layout

    def parameter_shardings(self, params: PyTree) -> PyTree:
        """The sharding of each parameter on the mesh; only shapes and paths are read."""
        assert self.mesh is not None
        return param_shardings(self.mesh, params, self.layout)

    def state_shardings(self, params: PyTree, state: PyTree) -> PyTree:
        """The shardings of an optimizer's state on the mesh."""
        assert self.mesh is not None
        return state_shardings(self.mesh, params, state, self.layout)

    def replicate(self, tree: PyTree) -> PyTree:
        """Put ``tree`` on the device, or repeat it on every device of the mesh."""
        return self.at(tree, None if self.mesh is None else replicated_shardings(self.mesh, tree))

    def parameters(self, tree: PyTree) -> PyTree:
        """Put ``tree`` on the device, or split it over the mesh like parameters."""
        return self.at(tree, None if self.mesh is None else self.parameter_shardings(tree))

    def at(self, tree: PyTree, shardings: PyTree | None) -> PyTree:
        """Put each leaf where its sharding says; None means one device."""
        return jax.tree.map(jnp.asarray, tree) if shardings is None else put(tree, shardings)

    def like(self, tree: PyTree, placed: PyTree) -> PyTree:
        """Put each leaf of ``tree``, from host memory, where the same leaf of ``placed`` is."""
        return self.at(tree, None if self.mesh is None else jax.tree.map(lambda leaf: leaf.sharding, placed))

    def to_host(self, tree: PyTree) -> PyTree:
        """Gather ``tree`` into this process's memory if there is a mesh; otherwise leave it."""
        return tree if self.mesh is None else to_host(tree)


class Described(Placement):
    """A placement on devices that do not exist: arrays are shapes with shardings."""

    def at(self, tree: PyTree, shardings: PyTree | None) -> PyTree:
        """Turn each leaf into a shape with its sharding."""

        def place(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            dtype = x.dtype if is_key(x) else jnp.result_type(x)
            return jax.ShapeDtypeStruct(jnp.shape(x), dtype, sharding=sharding)

        return jax.tree.map(place, tree, shardings)
