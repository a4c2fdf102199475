"""Programs that leave an axis of a mesh to XLA's partitioner: what it has to be told of directions."""

import itertools
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import sdy
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, Shaped


def is_partitioned() -> bool:
    """Whether the program being traced leaves a mesh axis to the partitioner."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return any(kind == AxisType.Auto and size > 1 for kind, size in sizes)


def split_as(params: PyTree[Shaped[Array, "..."]], tree: PyTree[Shaped[Array, "..."]]) -> PyTree[Shaped[Array, "..."]]:
    """``tree``, told to be split over devices as ``params`` are; on one device, ``tree``.

    Nothing in a draw depends on the parameters but their shapes, so that the partitioner would choose for itself. On a
    mesh whose axes are explicit, which ``jax.make_mesh`` makes, the split is part of an array's type, and is given to
    ``tree``.
    """
    tree = jax.tree.map(_in_the_type, params, tree)
    return jax.tree.map(_alike.bind, params, tree) if is_partitioned() else tree


def gathered(x: Array) -> Array:
    """``x``, whole on every device where its type says that it is split: a sum over it has one order."""
    split = _split_of(x)
    return x if split is None else jax.sharding.reshard(x, NamedSharding(split.mesh, PartitionSpec()))


def _in_the_type(x: Any, own: Array) -> Array:
    """``own``, split as the type of ``x`` says; as it is where that says nothing."""
    split = _split_of(x)
    return own if split is None else jax.sharding.reshard(own, split)


def _split_of(x: Any) -> NamedSharding | None:
    """The split in the type of an array, over explicit axes; None of another."""
    found = getattr(jax.typeof(x), "sharding", None) if isinstance(x, jax.Array) else None
    is_split = found is not None and not found.mesh.empty and any(axis is not None for axis in found.spec)
    return found if is_split else None


# A group of Shardy's (JAX's partitioner), whose members are split alike. JAX 0.10 has it as ``shard_alike``, lowered
# once for all arrays of a shape, so that queries, split by columns, were tied to outputs, split by rows; 0.11 lacks it.
_alike = Primitive("hiso_jax_alike")
_alike.def_abstract_eval(lambda x, own: own)
_groups = itertools.count()


def _lower(context: Any, x: Any, own: Any) -> list[Any]:
    number = next(_groups)
    for member in (x, own):
        sdy.sharding_group(member, number)
    return [own]


mlir.register_lowering(_alike, _lower, cacheable=False)
