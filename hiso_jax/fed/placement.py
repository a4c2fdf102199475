"""Where the arrays of a run live: on one device, or over a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree

from hiso_jax.fed import monitor as monitoring
from hiso_jax.fed.dispatch import RunState, newcomers
from hiso_jax.fed.keys import init_key
from hiso_jax.fed.mesh import MODEL, gather, param_shardings, put, replicated, state_shardings
from hiso_jax.fed.task import Task


def owned(tree: PyTree) -> PyTree:
    """A copy, one leaf after the other, for programs that reuse the memory of what they are given."""
    leaves, structure = jax.tree.flatten(tree)
    del tree
    for number, leaf in enumerate(leaves):
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            words = jnp.array(jax.random.key_data(leaf), copy=True)
            leaves[number] = jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
        else:
            leaves[number] = jnp.array(leaf, copy=True)
    return jax.tree.unflatten(structure, leaves)


class Placement:
    """Puts arrays where they live, and brings them back.

    Attributes:
      mesh: the devices, or None for one.
    """

    def __init__(self, mesh: Mesh | None) -> None:
        """For a mesh that :func:`hiso_jax.fed.mesh.check_mesh` has checked."""
        self.mesh = mesh

    def repeated(self, tree: PyTree) -> PyTree:
        """On the device, or repeated on every device of the mesh."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return put(tree, replicated(self.mesh, tree))

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
        return tree if self.mesh is None else gather(tree)

    def initial(self, task: Task, seed_key: Key[Array, ""]) -> PyTree:
        """The initial parameters, in this process's memory if there is a mesh: a device may not hold them whole."""
        key = init_key(seed_key)
        if self.mesh is None:
            return task.init(key)
        # What is loaded, not computed, is in host memory already, and must not become constants of a program.
        loaded = not jax.make_jaxpr(task.init)(key).jaxpr.eqns
        if loaded or self.mesh.shape.get(MODEL, 1) == 1:
            return jax.tree.map(np.asarray, task.init(key))
        shapes = jax.eval_shape(task.init, key)
        return gather(jax.jit(task.init, out_shardings=param_shardings(self.mesh, shapes))(self.repeated(key)))

    def start(self, initial: PyTree, tx: optax.GradientTransformationExtraArgs, clients: int) -> tuple[RunState, Any]:
        """The state of a run of so many clients that has not begun, and where it lives."""
        rest = monitoring.start(), newcomers(clients)
        if self.mesh is None:
            # The carry is donated to each dispatch; the result keeps the parameters, and an optimizer its keys.
            return RunState(owned(initial), owned(tx.init(initial)), *rest), None
        state = jax.eval_shape(tx.init, initial)
        own = param_shardings(self.mesh, initial), state_shardings(self.mesh, initial, state)
        params = put(initial, own[0])
        # Made where it lives: a curvature is as large as the parameters.
        state = jax.jit(tx.init, out_shardings=own[1])(params)
        return RunState(params, state, *self.repeated(rest)), RunState(*own, *replicated(self.mesh, rest))
