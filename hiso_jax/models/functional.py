"""flax.nnx modules as pairs of pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Key, PyTree


class Model(NamedTuple):
    """A model as two pure functions.

    Attributes:
      init: key → parameters, a nested dict of arrays.
      apply: (parameters, inputs) → outputs.
    """

    init: Callable[[Key[Array, ""]], PyTree]
    apply: Callable[..., Any]


def functional(build: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """The pure functions of the module that ``build`` makes; the module must hold parameters only."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    # One program, so that a key gives the same bits wherever it is called from, and starts sooner than op by op.
    @jax.jit
    def init(key: Key[Array, ""]) -> PyTree:
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

    def apply(params: PyTree, *inputs: jax.Array) -> Any:
        return nnx.merge(graph, params)(*inputs)

    return Model(init, apply)
