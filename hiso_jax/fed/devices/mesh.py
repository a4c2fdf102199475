"""Meshes of devices, on one or more machines, with an axis ``clients`` and, for large models, an axis ``model``.

The cohort is split over ``clients``. Parameters, curvature and the server's computations are repeated along this axis,
and each device makes the directions that it needs, so only [C, K, P] scalars and [C] losses cross it. Along ``model``
the parameters are split, and with them the curvature and each direction: the partitioner gives every device its part of
a Gaussian draw, with the same values on every mesh. A sum over a split parameter (for a clipped global norm, for
example) adds in another order, so it may differ from that of a single device in the last bit.
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
      devices: devices or their number, the same number for each process; None means all devices.
      model_shards: number of devices that the parameters are split over; the cohort is split over the rest.

    Raises:
      ValueError: there are fewer devices, or ``model_shards`` or the number of processes does not divide their number.
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
    if not len(devices):
        raise ParameterError("devices", "must be at least one device, got none")
    if model_shards < 1 or len(devices) % model_shards:
        raise ParameterError("model_shards", f"must divide the number of devices, {len(devices)}, got {model_shards}")
    grid = np.array(devices).reshape(len(devices) // model_shards, model_shards)
    return Mesh(grid, (CLIENTS, MODEL), axis_types=(AxisType.Auto,) * 2)


def check_mesh(mesh: Mesh) -> Mesh:
    """Check the axes of a mesh, and return the mesh with all axes left to the partitioner.

    Raises:
      ValueError: the mesh has no axis ``clients``, or an axis that is neither ``clients`` nor ``model``.
    """
    if CLIENTS not in mesh.axis_names or not set(mesh.axis_names) <= {CLIENTS, MODEL}:
        raise ParameterError(
            "mesh", f"must have an axis 'clients' and may have an axis 'model', got axes {mesh.axis_names}"
        )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _is_repeated() -> bool:
    """Whether every device along ``clients`` already runs the program being traced for itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True)).get(CLIENTS) == AxisType.Manual


def on_all_devices(function: Callable[..., PyTree], mesh: Mesh | None) -> Callable[..., PyTree]:
    """``function``, run by every device along ``clients`` for itself, as a single device would run it.

    The partitioner would also split loops over the cohort, which would then communicate in every iteration. Inside
    ``function``, :func:`over_clients` splits the work over the clients explicitly.
    """

    def run(*arguments: PyTree, **named: PyTree) -> PyTree:
        if mesh is None or _is_repeated():
            return function(*arguments, **named)
        # check_vma=False: scans begin from zeros that do not vary over the devices yet.
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
    """A device's part of the cohort, and the functions that combine the parts.

    Attributes:
      places: the places of its rows in the cohort, [c]; C or more for padding rows.
      join: the outputs of its rows [c, ...] → the outputs of all rows [C, ...].
      total: a tree → its sum over the devices.
    """

    places: Int[Array, "c"]
    join: Callable[[PyTree], PyTree]
    total: Callable[[PyTree], PyTree]


def over_clients(function: Callable[[PyTree, Part], PyTree], mesh: Mesh | None) -> Callable[[PyTree], PyTree]:
    """``function(rows [C, ...], part) → outputs``, split so that each device takes its part of the rows.

    ``part.join`` joins the outputs of all devices: every device needs every client's scalars, because an aggregate may
    be a median. If the devices do not divide the number of rows, the rows are padded with copies of the last row.
    ``part.join`` drops the outputs of the padding; before ``part.total``, ``function`` must exclude it by its places.
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
    """The shardings that repeat every leaf of ``tree`` on every device."""
    return jax.tree.map(lambda _: NamedSharding(mesh, P()), tree)


def put(tree: PyTree, shardings: PyTree) -> PyTree:
    """Put host or single-device arrays, which are equal in every process, onto the mesh.

    ``jax.device_put`` is not used: its processes would send each other every array to check that they are equal.
    """

    def place(x: Any, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(key_data(x))
        return from_key_data(jax.make_array_from_callback(host.shape, sharding, lambda index: host[index]), x)

    return jax.tree.map(place, tree, shardings)


def to_host(tree: PyTree) -> PyTree:
    """Gather each complete leaf into this process's memory, one by one: all together may not fit a device."""

    def whole(x: Any) -> Any:
        return from_key_data(multihost_utils.process_allgather(key_data(x), tiled=True), x)

    return jax.tree.map(whole, tree)
