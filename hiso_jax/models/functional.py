"""flax.nnx modules as pairs of pure functions."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Key, PyTree

from hiso_jax.factored import PerturbedAs
from hiso_jax.models.linear import Linear


class Model(NamedTuple):
    """A model as two pure functions.

    Attributes:
      init: key → parameters, a nested dict of arrays.
      apply: (parameters, inputs) → outputs; a parameter that ``perturbed_as`` names may be a
        :class:`hiso_jax.factored.PerturbedParameter`.
      perturbed_as: dotted name → ``"matrix"`` for the kernels of linear layers, None for other parameters.
    """

    init: Callable[[Key[Array, ""]], PyTree]
    apply: Callable[..., Any]
    perturbed_as: PerturbedAs


def functional(build: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """The pure functions of the module that ``build`` returns; the module must hold parameters only."""
    shapes = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graph = nnx.graphdef(shapes)
    layers = {".".join(map(str, path)) for path, module in nnx.iter_modules(shapes) if isinstance(module, Linear)}

    # A single program: a key gives the same bits for every caller, and it starts sooner than op by op.
    @jax.jit
    def init(key: Key[Array, ""]) -> PyTree:
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

    def apply(params: PyTree, *inputs: jax.Array) -> Any:
        return nnx.merge(graph, params)(*inputs)

    def perturbed_as(name: str) -> Literal["matrix"] | None:
        layer, _, parameter = name.rpartition(".")
        return "matrix" if parameter == "kernel" and layer in layers else None

    return Model(init, apply, perturbed_as)
