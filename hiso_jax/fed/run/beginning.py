"""Where a run begins: its initial parameters, and the state that goes from round to round."""

from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Key, PyTree

from hiso_jax.fed.devices import MODEL, Placement, gather, owned, param_shardings, put, replicated, state_shardings
from hiso_jax.fed.keys import init_key
from hiso_jax.fed.run import monitor as monitoring
from hiso_jax.fed.run.dispatch import RunState, newcomers
from hiso_jax.fed.task import Task


def initial_parameters(placement: Placement, task: Task, seed_key: Key[Array, ""]) -> PyTree:
    """The initial parameters, in this process's memory if there is a mesh: a device may not hold them whole."""
    key, mesh = init_key(seed_key), placement.mesh
    if mesh is None:
        return task.init(key)
    # What is loaded, not computed, is in host memory already, and must not become constants of a program.
    loaded = not jax.make_jaxpr(task.init)(key).jaxpr.eqns
    if loaded or mesh.shape.get(MODEL, 1) == 1:
        return jax.tree.map(np.asarray, task.init(key))
    shapes = jax.eval_shape(task.init, key)
    return gather(jax.jit(task.init, out_shardings=param_shardings(mesh, shapes))(placement.repeated(key)))


def begin(
    placement: Placement, initial: PyTree, tx: optax.GradientTransformationExtraArgs, clients: int
) -> tuple[RunState, Any]:
    """The state of a run of so many clients that has not begun, and where it lives (None on one device)."""
    rest, mesh = (monitoring.start(), newcomers(clients)), placement.mesh
    if mesh is None:
        # The carry is donated to each dispatch; the result keeps the parameters, and an optimizer its keys.
        return RunState(owned(initial), owned(tx.init(initial)), *rest), None
    state = jax.eval_shape(tx.init, initial)
    own = param_shardings(mesh, initial), state_shardings(mesh, initial, state)
    params = put(initial, own[0])
    # Made where it lives: a curvature is as large as the parameters.
    state = jax.jit(tx.init, out_shardings=own[1])(params)
    return RunState(params, state, *placement.repeated(rest)), RunState(*own, *replicated(mesh, rest))
