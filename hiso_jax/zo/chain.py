"""The members of an optax chain around a head: which may read or wrap what, and the structure of their states."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from hiso_jax.checks import first_line
from hiso_jax.zo.state import zo_states

# Asks an optimizer for no update, only whether its head is reached.
PROBE = "hiso_jax_probe"
# Asks a head for an update of zeros, so that the rest of its chain can be traced without a direction.
SKIP = "hiso_jax_skip"
# optax's wrappers whose update does not go through a head, by the names of their states.
WRAPPERS = {
    "ApplyIfFiniteState": "apply_if_finite",
    "MultiStepsState": "MultiSteps",
    "ConditionallyTransformState": "conditionally_transform",
    "ConditionallyMaskState": "conditionally_mask",
}


class Reached(Exception):
    """The head of a chain was asked for an update by :func:`check_chain`."""


def _check_wrappers(state: optax.OptState) -> None:
    """Refuse what wraps a head and cannot: it takes scalars for updates like the parameters.

    Raises:
      TypeError: such a wrapper stands around the head; it is named.
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
    """Refuse an optimizer in which something before the head needs what only stands behind it.

    What stands before ``scale_by_hiso`` or ``scale_by_zo`` sees the scalars of a round and not the parameters.

    Args:
      tx: the optimizer.
      params: the parameters, like ``aggregate`` arrays or their shapes.
      aggregate: of a round, what the head takes: [K, P] scalars, or a tree of such.

    Raises:
      TypeError: a wrapper around the head that cannot stand there.
      ValueError: a member before the head keeps something like the parameters, or reads them.
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
    """Parameters as a tree of its own, so that scalars cannot be broadcast against a single array of them."""
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
    """The update of an optimizer in a round, from all that a round can give it.

    Args:
      tx: the optimizer.
      aggregate: what its head takes; of a first-order method a tree like the parameters.
      state: of the optimizer.
      params: the parameters.
      value: the loss where the round began, as optax calls it (``reduce_on_plateau``, ``scale_by_polyak``); None where
        it is not known.
      extra: what its head reads.

    Raises:
      ValueError: the optimizer asks for what a round does not have, a gradient or the loss as a function, say.
    """
    known = extra if value is None else {"value": value, **extra}
    try:
        # optax raises floats to the power of counts, which strict promotion of dtypes does not take.
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(aggregate, state, params, **known)
    except TypeError as error:
        missing = re.search(r"missing \d+ required keyword-only arguments?: (.*)", str(error))
        if missing is None:
            raise
        what = "value, the loss, which these rounds do not hold" if value is None else "what a round does not have"
        raise ValueError(f"the optimizer asks for {what}: {missing[1]}") from error


def reads_loss(tx: optax.GradientTransformation, params: PyTree, aggregate: PyTree) -> bool:
    """Whether an optimizer's update depends on the loss: everyone who repeats the update must then be sent it.

    Args:
      tx: the optimizer.
      params: the parameters, like ``aggregate`` arrays or their shapes.
      aggregate: of a round, what ``tx`` takes.

    Raises:
      ValueError: as :func:`check_chain`.
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
    """An optimizer's first state in the structure that its updates leave.

    What stands before the head is made for the parameters and then sees scalars: ``zero_nans`` keeps a flag for each
    parameter at first, and for each array of scalars afterwards. What has another structure after an update begins as
    zeros in that structure; all else stays.

    Args:
      tx: headed by ``scale_by_zo``, ``scale_by_hiso`` or another head.
      state: of ``tx.init(params)``.
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
        # A member that cannot stand before the head is refused where a round is traced.
        return state


def _opened(node: PyTree) -> tuple[list[Any], Any]:
    """The children of a node, and its own structure alone."""
    return jax.tree_util.tree_flatten(node, is_leaf=lambda child: child is not node)


def _in_structure_of(wanted: PyTree, own: PyTree) -> PyTree:
    """``own`` in the structure of ``wanted``: only the nodes that differ become zeros."""
    (new, form), (old, before) = _opened(wanted), _opened(own)
    if str(form) != str(before):
        return _zeros(wanted)
    if len(old) == 1 and old[0] is own:
        return own
    return jax.tree_util.tree_unflatten(before, [_in_structure_of(*pair) for pair in zip(new, old, strict=True)])


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), jnp.result_type(x)), tree)
