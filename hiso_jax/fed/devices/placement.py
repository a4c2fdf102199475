"""Where the arrays of a run live: on one device, or over a mesh."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from hiso_jax.fed.devices.mesh import param_shardings, put, replicated_shardings, to_host
from hiso_jax.fed.devices.words import from_words, words_of


def owned(tree: PyTree) -> PyTree:
    """A copy, one leaf after the other, for programs that reuse the memory of what they are given."""
    leaves, structure = jax.tree.flatten(tree)
    del tree
    for number, leaf in enumerate(leaves):
        leaves[number] = from_words(jnp.array(words_of(leaf), copy=True), leaf)
    return jax.tree.unflatten(structure, leaves)


class Placement:
    """Puts arrays where they live, and brings them back.

    Attributes:
      mesh: the devices, or None for one.
    """

    def __init__(self, mesh: Mesh | None) -> None:
        """For a mesh that :func:`hiso_jax.fed.mesh.check_mesh` has checked."""
        self.mesh = mesh

    def replicate(self, tree: PyTree) -> PyTree:
        """On the device, or repeated on every device of the mesh."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return put(tree, replicated_shardings(self.mesh, tree))

    def parameters(self, tree: PyTree) -> PyTree:
        """On the device, or split as parameters are over the mesh."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return put(tree, param_shardings(self.mesh, tree))

    def like(self, tree: PyTree, placed: PyTree) -> PyTree:
        """From host memory, each leaf where that of ``placed`` lives."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return put(tree, jax.tree.map(lambda leaf: leaf.sharding, placed))

    def whole(self, tree: PyTree) -> PyTree:
        """``tree``, in this process's memory if there is a mesh."""
        return tree if self.mesh is None else to_host(tree)
