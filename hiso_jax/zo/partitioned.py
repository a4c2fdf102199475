"""Sharding of directions like their parameters, on mesh axes of XLA's partitioner and on explicit axes."""

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
    """``tree``, sharded over devices like ``params``; on one device, ``tree`` unchanged.

    A draw depends only on the shapes of the parameters, so the partitioner would choose a sharding of its own. On a
    mesh with explicit axes, as ``jax.make_mesh`` makes it, the sharding is part of an array's type and is set on
    ``tree``.
    """
    tree = jax.tree.map(_in_the_type, params, tree)
    return jax.tree.map(_alike.bind, params, tree) if is_partitioned() else tree


def gathered(x: Array) -> Array:
    """``x``, replicated on every device if its type is sharded, so that a sum over it has one order."""
    split = _split_of(x)
    return x if split is None else jax.sharding.reshard(x, NamedSharding(split.mesh, PartitionSpec()))


def _in_the_type(x: Any, own: Array) -> Array:
    """``own`` with the sharding in the type of ``x``; unchanged if that type has none."""
    split = _split_of(x)
    return own if split is None else jax.sharding.reshard(own, split)


def _split_of(x: Any) -> NamedSharding | None:
    """The sharding over explicit axes in the type of an array; None if there is none."""
    found = getattr(jax.typeof(x), "sharding", None) if isinstance(x, jax.Array) else None
    is_split = found is not None and not found.mesh.empty and any(axis is not None for axis in found.spec)
    return found if is_split else None


# A sharding group of Shardy (JAX's partitioner): its members have the same sharding. JAX 0.10 has ``shard_alike`` but
# lowers it once for all arrays of a shape, which tied queries (split by columns) to outputs (split by rows). JAX 0.11
# lacks it.
_alike = Primitive("hiso_jax_alike")
_alike.def_abstract_eval(lambda x, own: own)
_groups = itertools.count()


def _lower(context: Any, x: Any, own: Any) -> list[Any]:
    number = next(_groups)
    for member in (x, own):
        sdy.sharding_group(member, number)
    return [own]


mlir.register_lowering(_alike, _lower, cacheable=False)
