"""An optax chain around a head: checks of its members, its update, and the structure of its state."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from hiso_jax.checks import first_line
from hiso_jax.zo.state import zo_states

# Tests whether an optimizer's update reaches its head, without an update.
PROBE = "hiso_jax_probe"
# Makes a head return an update of zeros, so that the rest of its chain can be traced without a direction.
SKIP = "hiso_jax_skip"
# optax wrappers that cannot contain a head, by the names of their states.
WRAPPERS = {
    "ApplyIfFiniteState": "apply_if_finite",
    "MultiStepsState": "MultiSteps",
    "ConditionallyTransformState": "conditionally_transform",
    "ConditionallyMaskState": "conditionally_mask",
}


class Reached(Exception):
    """Raised by the head of a chain when :func:`check_chain` calls its update."""


def _check_wrappers(state: optax.OptState) -> None:
    """Refuse a wrapper that contains a head but expects updates like the parameters, not scalars.

    Raises:
      TypeError: such a wrapper contains the head; the message names the wrapper.
    """

    def wraps(node: Any) -> bool:
        return type(node).__name__ in WRAPPERS and bool(zo_states(node))

    for node in jax.tree.leaves(state, is_leaf=wraps):
        if wraps(node):
            name = WRAPPERS[type(node).__name__]
            instead = "to average several batches take more perturbations" if name == "MultiSteps" else "wrap those"
            raise TypeError(
                f"optax.{name} cannot wrap scale_by_hiso or scale_by_zo, which take scalars where it takes updates "
                f"like the parameters; it can wrap the members behind them: {instead}"
            )


def check_chain(tx: optax.GradientTransformationExtraArgs, params: PyTree, aggregate: PyTree) -> None:
    """Refuse an optimizer in which a member before the head needs the parameters.

    A member before ``scale_by_hiso`` or ``scale_by_zo`` receives the scalars of a round and not the parameters.

    Args:
      tx: the optimizer.
      params: the parameters, as arrays or shapes.
      aggregate: the head's input in a round, as arrays or shapes: [K, P] scalars, or a tree of such arrays.

    Raises:
      TypeError: a wrapper that cannot contain a head does.
      ValueError: a member before the head keeps a state like the parameters or reads them, or the update never
        reaches the head.
    """
    tree, known = _as_tree(params), {"value": jnp.float32(0), PROBE: True}
    _check_wrappers(jax.eval_shape(lambda: tx.init(_zeros(tree))))
    try:
        jax.eval_shape(lambda given: tx.update(given, tx.init(_zeros(tree)), None, **known), aggregate)
    except Reached:
        return
    except Exception as error:
        raise ValueError(
            "what stands before scale_by_hiso or scale_by_zo in a chain sees the [K, P] scalars of a round and not the "
            f"parameters; move trace, adam, weight decay and the like behind it ({first_line(error)})"
        ) from error
    raise ValueError("the optimizer's update never reaches its scale_by_hiso or scale_by_zo")


def _as_tree(params: PyTree) -> PyTree:
    """The parameters as a tree with at least one level, so that scalars cannot broadcast against a single array."""
    return [params] if jax.tree_util.treedef_is_leaf(jax.tree.structure(params)) else params


def update_with(
    tx: optax.GradientTransformationExtraArgs,
    aggregate: PyTree,
    state: optax.OptState,
    params: PyTree,
    *,
    value: Array | None,
    **extra: Any,
) -> tuple[PyTree, optax.OptState]:
    """The update of an optimizer in a round, with every keyword that a round can provide.

    Args:
      tx: the optimizer.
      aggregate: the head's input; for a first-order method a tree like the parameters.
      state: the optimizer's state.
      params: the parameters.
      value: the loss at the start of the round, under optax's name (``reduce_on_plateau``, ``scale_by_polyak``); None
        if it is unknown.
      extra: keywords that the head reads.

    Raises:
      ValueError: the optimizer needs an input that a round does not have, for example a gradient or the loss function.
    """
    known = extra if value is None else {"value": value, **extra}
    try:
        # optax raises floats to the power of integer counts, which strict dtype promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(aggregate, state, params, **known)
    except TypeError as error:
        missing = re.search(r"missing \d+ required keyword-only arguments?: (.*)", str(error))
        if missing is None:
            raise
        what = "value, the loss, which these rounds do not compute" if value is None else "what a round does not have"
        raise ValueError(f"the optimizer asks for {what}: {missing[1]}") from error


def reads_loss(tx: optax.GradientTransformation, params: PyTree, aggregate: PyTree) -> bool:
    """Whether an optimizer's update depends on the loss; a client that repeats the update must then receive it.

    Args:
      tx: the optimizer.
      params: the parameters, as arrays or shapes.
      aggregate: the input of ``tx`` in a round, as arrays or shapes.

    Raises:
      ValueError: as in :func:`check_chain`.
    """
    tx, tree = optax.with_extra_args_support(tx), _as_tree(params)
    if zo_states(jax.eval_shape(lambda: tx.init(_zeros(tree)))):
        check_chain(tx, params, aggregate)

    def update(given: PyTree, loss: Array) -> PyTree:
        zeros = _zeros(tree)
        return update_with(tx, given, tx.init(zeros), zeros, value=loss, key=jax.random.key(0), **{SKIP: True})

    program = jax.make_jaxpr(update)(aggregate, jax.ShapeDtypeStruct((), jnp.float32)).jaxpr
    loss = program.invars[-1]
    return any(loss is each for equation in program.eqns for each in equation.invars) or loss in program.outvars


def settled(tx: optax.GradientTransformationExtraArgs, state: optax.OptState, params: PyTree) -> optax.OptState:
    """An optimizer's initial state, in the structure that its updates return.

    A member before the head is initialised with the parameters and then receives scalars: ``zero_nans`` first keeps a
    flag for each parameter, and afterwards one for each array of scalars. A node whose structure differs after an
    update starts as zeros in the later structure; all other nodes stay.

    Args:
      tx: an optimizer headed by ``scale_by_zo``, ``scale_by_hiso`` or another head.
      state: the result of ``tx.init(params)``.
      params: the parameters, or their shapes.
    """
    if not zo_states(state):
        return state

    def after(state: optax.OptState) -> optax.OptState:
        head, zeros = zo_states(state)[0], _zeros(params)
        scalars = jnp.zeros((1, head.directions.groups or 1), jnp.float32)
        return update_with(
            tx, scalars, state, zeros, value=jnp.float32(0), key=jax.random.key(0), clients=1, **{SKIP: True}
        )[1]

    try:
        return _in_structure_of(jax.eval_shape(after, state), state)
    except Exception:
        # Tracing a round refuses a member that cannot precede the head.
        return state


def _opened(node: PyTree) -> tuple[list[Any], Any]:
    """The direct children of a node, and the structure of the node alone."""
    return jax.tree_util.tree_flatten(node, is_leaf=lambda child: child is not node)


def _in_structure_of(wanted: PyTree, own: PyTree) -> PyTree:
    """``own`` in the structure of ``wanted``; only nodes that differ become zeros."""
    (new, form), (old, before) = _opened(wanted), _opened(own)
    if str(form) != str(before):
        return _zeros(wanted)
    if len(old) == 1 and old[0] is own:
        return own
    return jax.tree_util.tree_unflatten(before, [_in_structure_of(*pair) for pair in zip(new, old, strict=True)])


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), jnp.result_type(x)), tree)
