"""Programs that leave an axis of a mesh to XLA's partitioner: what it has to be told of directions."""

import jax
from jax.experimental.shard_alike import shard_alike
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType
from jaxtyping import Array, PyTree, Shaped


def is_partitioned() -> bool:
    """Whether the program being traced leaves a mesh axis to the partitioner."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return any(kind == AxisType.Auto and size > 1 for kind, size in sizes)


def split_as(params: PyTree[Shaped[Array, "..."]], tree: PyTree[Shaped[Array, "..."]]) -> PyTree[Shaped[Array, "..."]]:
    """``tree``, told to be split over devices as ``params`` are; on one device, ``tree``.

    Nothing in a draw depends on the parameters but their shapes, so that the partitioner would choose for itself.
    """
    if not is_partitioned():
        return tree
    leaves, structure = jax.tree.flatten(tree)
    told = []
    for number, (x, own) in enumerate(zip(jax.tree.leaves(params), leaves, strict=True)):
        # JAX 0.10 caches what it makes of shard_alike by shape, and would tie all leaves of a shape to each other
        # (queries, split by columns, to outputs, split by rows); what stands under other metadata it makes anew.
        with set_xla_metadata(hiso_jax_leaf=number):
            told.append(shard_alike(x, own)[1])
    return jax.tree.unflatten(structure, told)
