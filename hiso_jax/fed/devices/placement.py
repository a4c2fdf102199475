"""Where the arrays of a run live: on one device, over a mesh, or on devices that are only described."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from hiso_jax.fed.devices.layout import Layout, longest_axis, param_shardings, state_shardings
from hiso_jax.fed.devices.mesh import put, replicated_shardings, to_host
from hiso_jax.fed.devices.prng_keys import from_key_data, is_key, key_data


def owned(tree: PyTree) -> PyTree:
    """A copy, one leaf after the other, for programs that reuse the memory of what they are given."""
    leaves, structure = jax.tree.flatten(tree)
    del tree
    for number, leaf in enumerate(leaves):
        leaves[number] = from_key_data(jnp.array(key_data(leaf), copy=True), leaf)
    return jax.tree.unflatten(structure, leaves)


class Placement:
    """Puts arrays where they live, and brings them back.

    Attributes:
      mesh: the devices, or None for one.
      layout: how parameters are split over them.
    """

    def __init__(self, mesh: Mesh | None, layout: Layout = longest_axis) -> None:
        """For a mesh that :func:`~hiso_jax.fed.devices.check_mesh` has checked, and the parameters' layout on it."""
        self.mesh, self.layout = mesh, layout

    def parameter_shardings(self, params: PyTree) -> PyTree:
        """Where each parameter lives on the mesh; only shapes and paths are read."""
        assert self.mesh is not None
        return param_shardings(self.mesh, params, self.layout)

    def state_shardings(self, params: PyTree, state: PyTree) -> PyTree:
        """Where an optimizer's state lives on the mesh."""
        assert self.mesh is not None
        return state_shardings(self.mesh, params, state, self.layout)

    def replicate(self, tree: PyTree) -> PyTree:
        """On the device, or repeated on every device of the mesh."""
        return self.at(tree, None if self.mesh is None else replicated_shardings(self.mesh, tree))

    def parameters(self, tree: PyTree) -> PyTree:
        """On the device, or split as parameters are over the mesh."""
        return self.at(tree, None if self.mesh is None else self.parameter_shardings(tree))

    def at(self, tree: PyTree, shardings: PyTree | None) -> PyTree:
        """Each leaf where its sharding says; None is one device."""
        return jax.tree.map(jnp.asarray, tree) if shardings is None else put(tree, shardings)

    def like(self, tree: PyTree, placed: PyTree) -> PyTree:
        """From host memory, each leaf where that of ``placed`` lives."""
        return self.at(tree, None if self.mesh is None else jax.tree.map(lambda leaf: leaf.sharding, placed))

    def to_host(self, tree: PyTree) -> PyTree:
        """``tree``, in this process's memory if there is a mesh."""
        return tree if self.mesh is None else to_host(tree)


class Described(Placement):
    """Of devices that nobody has: arrays are shapes that know where they would live."""

    def at(self, tree: PyTree, shardings: PyTree | None) -> PyTree:
        """Each leaf as a shape with its sharding."""

        def place(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            dtype = x.dtype if is_key(x) else jnp.result_type(x)
            return jax.ShapeDtypeStruct(jnp.shape(x), dtype, sharding=sharding)

        return jax.tree.map(place, tree, shardings)
