"""Many devices, on one machine or many: a mesh with an axis ``clients`` and, for large models, an axis ``model``.

The cohort is split over ``clients``; parameters, curvature and everything the server does are repeated there, each
device making the directions it needs, so that only [C, K, P] scalars and [C] losses cross it. Along ``model`` the
parameters themselves are split, and with them the curvature and each direction: the partitioner gives every device
its own part of a Gaussian draw, the same numbers whatever the mesh. What sums over a split parameter (a clipped global
norm, say) sums in another order, and may part from a single device in the last bit.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.fed.devices.execution import filled
from hiso_jax.fed.devices.prng_keys import from_key_data, key_data

CLIENTS = "clients"
MODEL = "model"


def make_mesh(devices: int | Sequence[jax.Device] | None = None, *, model_shards: int = 1) -> Mesh:
    """A mesh of clients × model.

    Args:
      devices: which devices, or how many, the same number of each process; None means all of them.
      model_shards: over how many devices the parameters are split; the cohort is split over the rest.

    Raises:
      ValueError: more devices than there are, or a number that ``model_shards`` or the processes do not divide.
    """
    present = jax.devices()
    if devices is None or isinstance(devices, int):
        count = len(present) if devices is None else devices
        if not 1 <= count <= len(present):
            raise ParameterError("devices", f"must be between 1 and the number present, {len(present)}, got {count}")
        processes = jax.process_count()
        if count % processes:
            raise ParameterError("devices", f"must be a multiple of the number of processes, {processes}, got {count}")
        own = [[device for device in present if device.process_index == index] for index in range(processes)]
        if min(map(len, own)) < count // processes:
            raise ParameterError(
                "devices", f"must be at most {processes * min(map(len, own))}, as many of each process"
            )
        devices = [device for devices in own for device in devices[: count // processes]]
    if model_shards < 1 or len(devices) % model_shards:
        raise ParameterError("model_shards", f"must divide the number of devices, {len(devices)}, got {model_shards}")
    grid = np.array(devices).reshape(len(devices) // model_shards, model_shards)
    return Mesh(grid, (CLIENTS, MODEL), axis_types=(AxisType.Auto,) * 2)


def check_mesh(mesh: Mesh) -> Mesh:
    """The same mesh with an axis ``clients`` and only axes that are known here, left to the partitioner.

    Raises:
      ValueError: it has no axis ``clients``, or one that is neither ``clients`` nor ``model``.
    """
    if CLIENTS not in mesh.axis_names or not set(mesh.axis_names) <= {CLIENTS, MODEL}:
        raise ParameterError(
            "mesh", f"must have an axis 'clients' and may have an axis 'model', got axes {mesh.axis_names}"
        )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _is_repeated() -> bool:
    """Whether the program being traced is already one that every device along ``clients`` runs for itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True)).get(CLIENTS) == AxisType.Manual


def on_all_devices(function: Callable[..., PyTree], mesh: Mesh | None) -> Callable[..., PyTree]:
    """``function``, run by every device along ``clients`` for itself: the program that a single device would run.

    Left to the partitioner, loops over the cohort would be split, too, and communicate at every turn. Inside,
    :func:`over_clients` splits what is to be split.
    """

    def run(*arguments: PyTree, **named: PyTree) -> PyTree:
        if mesh is None or _is_repeated():
            return function(*arguments, **named)
        # Not check_vma: scans begin from zeros that no device has touched yet.
        everywhere = jax.shard_map(
            lambda given: function(*given[0], **given[1]),
            mesh=mesh,
            in_specs=P(),
            out_specs=P(),
            axis_names={CLIENTS},
            check_vma=False,
        )
        return everywhere((arguments, named))

    return run


class Part(NamedTuple):
    """A device's part of the cohort, and how parts come together.

    Attributes:
      places: of its rows in the cohort, [c]; C or more for rows that only fill the part up.
      join: its rows' outputs [c, ...] → all rows' [C, ...].
      total: a tree → its sum over the devices.
    """

    places: Int[Array, "c"]
    join: Callable[[PyTree], PyTree]
    total: Callable[[PyTree], PyTree]


def over_clients(function: Callable[[PyTree, Part], PyTree], mesh: Mesh | None) -> Callable[[PyTree], PyTree]:
    """``function(rows [C, ...], part) → outputs``, each device taking its part of the rows.

    ``part.join`` joins all devices' outputs for their own rows: every device needs every client's scalars, since an
    aggregate may be a median. A number of rows that the devices do not divide is filled with copies of the last,
    whose outputs are dropped; a ``part.total`` must leave them out by their places.
    """

    def count(rows: PyTree) -> int:
        return jax.tree.leaves(rows)[0].shape[0]

    if mesh is None:
        return lambda rows: function(rows, Part(jnp.arange(count(rows)), lambda outputs: outputs, lambda sums: sums))
    shards = mesh.shape[CLIENTS]

    def split(rows: PyTree) -> PyTree:
        each = -(-count(rows) // shards)
        begin = lax.axis_index(CLIENTS) * each

        def join(outputs: PyTree) -> PyTree:
            return jax.tree.map(lambda a: lax.all_gather(a, CLIENTS, tiled=True)[: count(rows)], outputs)

        whole = filled(rows, each * shards)
        own = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, begin, each), whole)
        return function(own, Part(begin + jnp.arange(each), join, lambda sums: lax.psum(sums, CLIENTS)))

    return split


def replicated_shardings(mesh: Mesh, tree: PyTree) -> PyTree:
    """Shardings that repeat every leaf of ``tree`` on every device."""
    return jax.tree.map(lambda _: NamedSharding(mesh, P()), tree)


def put(tree: PyTree, shardings: PyTree) -> PyTree:
    """Host or single-device arrays, equal in every process, onto the mesh.

    Not by ``jax.device_put``, which has the processes send each other every array to see that they are equal.
    """

    def place(x: Any, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(key_data(x))
        return from_key_data(jax.make_array_from_callback(host.shape, sharding, lambda index: host[index]), x)

    return jax.tree.map(place, tree, shardings)


def to_host(tree: PyTree) -> PyTree:
    """Every leaf whole in this process's memory, one after the other: all together may not fit a device."""

    def whole(x: Any) -> Any:
        return from_key_data(multihost_utils.process_allgather(key_data(x), tiled=True), x)

    return jax.tree.map(whole, tree)
