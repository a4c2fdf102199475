"""Scanned layers as a pytree node, shared by models and the zeroth-order code.

A model with identical layers keeps each parameter once, with a leading axis of layers, and scans over it. If the model
declares this with :class:`Stacked`, code that draws, perturbs or stores the parameters can go layer by layer, and every
layer gets the values that it would have as a separate subtree.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import PyTree

ONE_TURN = "one_turn"
"""The named scope of a loop with one turn, whose trip count its program does not show."""

Body = Callable[[PyTree, PyTree, Any], tuple[PyTree, PyTree]]


@dataclass(frozen=True)
class Layers:
    """Layers for a model to scan over, made one at a time.

    Attributes:
      inputs: a pytree of [L, ...] arrays.
      open: one layer's slice of the inputs → the layer's parameters.
    """

    inputs: PyTree
    open: Callable[[PyTree], PyTree]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stacked:
    """A subtree of parameters whose leaves have a leading axis of layers.

    The keys of directions treat it as the list of its layers' subtrees: with m leaves, leaf j of layer l has index
    i + l·m + j if the first has index i.

    Attributes:
      layers: the subtree, its leaves [L, ...].
    """

    layers: PyTree

    @property
    def depth(self) -> int:
        """L, the number of layers."""
        return jax.tree.leaves(self.layers)[0].shape[0]

    def unstacked(self) -> list[PyTree]:
        """The list of the layers' subtrees."""
        return [jax.tree.map(lambda x, layer=layer: x[layer], self.layers) for layer in range(self.depth)]


def _opened(layers: Stacked | Layers) -> Layers:
    return Layers(layers.layers, lambda layer: layer) if isinstance(layers, Stacked) else layers


def scan(layers: Any, body: Body, carry: PyTree, inputs: PyTree = None) -> tuple[PyTree, PyTree]:
    """Run ``body`` over stacked layers in one scan, or over a list of layers one after the other.

    Args:
      layers: a :class:`Stacked`, a :class:`Layers`, or a list of subtrees.
      body: ``(carry, layer parameters, layer input) → (carry, output)``.
      carry: the value that is passed from layer to layer.
      inputs: a pytree of [L, ...] arrays, one slice per layer; None for no inputs.

    Returns:
      The last carry, and the outputs, [L, ...].
    """
    if isinstance(layers, Stacked | Layers):
        each = _opened(layers)
        return lax.scan(lambda c, xs: body(c, each.open(xs[0]), xs[1]), carry, (each.inputs, inputs))
    outputs = []
    for number, layer in enumerate(layers):
        carry, output = body(carry, layer, jax.tree.map(lambda a, number=number: a[number], inputs))
        outputs.append(output)
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *outputs)


def scan_to_last(layers: Any, body: Body, last: Body, carry: PyTree, inputs: PyTree = None) -> PyTree:
    """:func:`scan` without outputs, and with a separate body for the last layer.

    The scan goes over layer indices, because a slice of stacked arrays without their last layer would be a copy.

    Args:
      layers: as in :func:`scan`.
      body: the body of all layers but the last.
      last: the body of the last layer.
      carry: as in :func:`scan`.
      inputs: as in :func:`scan`.
    """

    def turn(carry: PyTree, number: Any, function: Body) -> PyTree:
        of_layer = jax.tree.map(lambda a: lax.dynamic_index_in_dim(jnp.asarray(a), number, keepdims=False), inputs)
        if isinstance(layers, Stacked | Layers):
            each = _opened(layers)
            own = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, number, keepdims=False), each.inputs)
            return function(carry, each.open(own), of_layer)[0]
        return function(carry, layers[number], of_layer)[0]

    if isinstance(layers, Stacked | Layers):
        depth = jax.tree.leaves(_opened(layers).inputs)[0].shape[0]
        carry = lax.scan(lambda c, number: (turn(c, number, body), None), carry, jnp.arange(depth - 1))[0]
        return _one_turn(lambda c, number: turn(c, number, last), carry, depth)
    else:
        depth = len(layers)
        for number in range(depth - 1):
            carry = turn(carry, number, body)
    return turn(carry, depth - 1, last)


def _one_turn(function: Callable[[PyTree, Any], PyTree], carry: PyTree, depth: int) -> PyTree:
    """``function(carry, depth - 1)`` in a loop of one turn, whose trip count XLA does not know.

    If an operation outside a loop also reads the stacked arrays, XLA makes the perturbed or drawn arrays a second time.
    Derivatives have no such arrays: they are those of the function without a loop.
    """
    # Arrays that it reads are arguments, integers too: a function with a custom derivative may not close over any.
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(carry, jnp.int32(0))

    def converted(carry: PyTree, number: Any, read: list[Any]) -> PyTree:
        run = jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, read))
        return jax.tree.unflatten(jax.tree.structure(shapes), run(*jax.tree.leaves((carry, number))))

    @jax.custom_jvp
    def looped(carry: PyTree, read: list[Any]) -> PyTree:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        end = lax.optimization_barrier(jnp.int32(depth))
        with jax.named_scope(ONE_TURN):
            return lax.fori_loop(
                end - 1, end, lambda number, _: converted(carry, number.astype(jnp.int32), read), zeros
            )

    @looped.defjvp
    def _(primals: tuple[PyTree, list[Any]], tangents: tuple[PyTree, list[Any]]) -> tuple[PyTree, PyTree]:
        return jax.jvp(lambda carry, read: converted(carry, jnp.int32(depth - 1), read), primals, tangents)

    return looped(carry, list(traced.consts))


def path_name(path: tuple[Any, ...]) -> str:
    """A parameter's path as one dotted name, ``layers.self_attn.q_proj.kernel``."""
    # The key of a Stacked itself is an attribute, and not part of the name.
    keys = (key for key in path if not isinstance(key, jax.tree_util.GetAttrKey))
    return jax.tree_util.keystr(tuple(keys), simple=True, separator=".")


def is_stacked(node: Any) -> bool:
    """Whether ``node`` declares scanned layers."""
    return isinstance(node, Stacked)


def merge(first: Any, second: Any) -> Any:
    """The union of two nested dicts that share no leaf; layers are merged inside their scan.

    Raises:
      ValueError: both have the same leaf.
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        both = {name: merge(first[name], second[name]) for name in first.keys() & second.keys()}
        return {**first, **second, **both}
    if isinstance(first, Stacked | Layers) and isinstance(second, Stacked | Layers):
        a, b = _opened(first), _opened(second)
        return Layers((a.inputs, b.inputs), lambda layer: merge(a.open(layer[0]), b.open(layer[1])))
    raise ValueError("trees to be merged must not share a leaf")
