"""The execution of a cohort in memory: all clients at once, some at a time, or one by one.

The results are the same up to rounding; speed and memory differ. Measured on 2 CPU cores
(``docs/reference/benchmarks``):
a vmap over diverged clients turns convolutions into grouped convolutions and takes two to three times as long as a map
over the clients, while matrix products are equally fast; a flat batch of more than a few hundred images exceeds the
cache. Accelerators use the widest execution that fits the memory.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import Mesh
from jaxtyping import Int, PyTree

from hiso_jax.factored import PerturbedAs
from hiso_jax.zo import DirectionsMode, working_dtype

# On CPU, at most: examples in one flat batch, and diverged clients in one vmap for a model without convolutions.
CPU_FLAT_EXAMPLES = 512
CPU_TOGETHER = 8
# The share of the memory that a cohort may take beside the parameters and the data.
DEVICE_SHARE = 0.25
HOST_SHARE = 0.125
# Below this number of parameters a direction costs almost nothing to make, so it is made again.
MANY_PARAMETERS = 1_000_000
JAXPRS = (ClosedJaxpr, Jaxpr)


class Execution(NamedTuple):
    """The numbers of clients that are in memory at the same time.

    Attributes:
      flat: clients evaluated as one flat batch while all have the server's parameters (local step 0).
      stream: clients whose own parameters exist at the same time (K > 1).
      vmapped: clients with their own parameters that are evaluated in one vmap; 1 maps over them one by one.
      gathered: batches that may stay in memory for all forward passes of a round; more are gathered again for each.
    """

    flat: int
    stream: int
    vmapped: int
    gathered: int


class ExecutionSettings(NamedTuple):
    """Settings of how a round is computed, which change its results only by rounding.

    Attributes:
      client_chunk: diverged clients (K > 1) evaluated together: 1 maps over them; a larger number vmaps them and also
        bounds the clients in memory. None chooses by platform, model and memory.
      memory_budget: bytes that a cohort may take on a device; None means a share of its memory.
      directions: ``"keep"`` makes each direction once, for all clients and the update; ``"regenerate"`` makes it again
        for the update and needs one copy of the trained parameters beside them. Kept directions need two copies, or
        P + 1 if the aggregate needs complete messages. The bits are the same. None keeps them if K = 1, the parameters
        are many and the memory suffices.
      mesh: devices to split the cohort over; see :func:`hiso_jax.fed.make_mesh`.
      perturbed_as: form in which the task's model reads parameters perturbed along a low-rank direction; see
        :func:`hiso_jax.zo.perturb`.
    """

    client_chunk: int | None = None
    memory_budget: int | None = None
    directions: DirectionsMode | None = None
    mesh: Mesh | None = None
    perturbed_as: PerturbedAs | None = None


def filled(tree: PyTree, rows: int) -> PyTree:
    """``tree`` [C, ...], padded to ``rows`` ≥ C rows with copies of its last row."""

    def fill(array: jax.Array) -> jax.Array:
        return jnp.pad(array, [(0, rows - array.shape[0])] + [(0, 0)] * (array.ndim - 1), mode="edge")

    return jax.tree.map(fill, tree)


def in_pieces(function: Callable[[PyTree], PyTree], inputs: PyTree, size: int) -> PyTree:
    """The joined outputs [C, ...] of ``function`` on pieces of ``inputs`` [C, ...] of at most ``size`` rows.

    The pieces have equal length; the last is padded with copies of the last row, whose outputs are dropped.
    """
    count = jax.tree.leaves(inputs)[0].shape[0]
    if size >= count:
        return function(inputs)
    pieces = -(-count // size)
    length = -(-count // pieces)
    whole = filled(inputs, pieces * length)
    outputs = lax.map(function, jax.tree.map(lambda a: a.reshape(pieces, length, *a.shape[1:]), whole))
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:])[:count], outputs)


def looped_once(function: Callable[[PyTree], PyTree], inputs: PyTree, places: Int[jax.Array, "1"]) -> PyTree:
    """``function`` of the only row of ``inputs``, compiled as the body of a loop.

    A map over one row is no loop to the compiler, which fuses its body with what is around it; sums then have other
    last bits than in a simulation, whose loop has a row for each client of the cohort. The trip count is therefore a
    number that the compiler does not know: how many places are not negative.
    """
    two = jax.tree.map(lambda a: jnp.concatenate([a, a]), inputs)
    shapes = jax.eval_shape(function, jax.tree.map(lambda a: a[0], inputs))
    zero = jax.tree.map(lambda x: jnp.zeros((2, *x.shape), x.dtype), shapes)

    def step(row: jax.Array, outputs: PyTree) -> PyTree:
        made = function(jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, row, keepdims=False), two))
        return jax.tree.map(lambda o, x: lax.dynamic_update_index_in_dim(o, x, row, 0), outputs, made)

    return jax.tree.map(lambda a: a[:1], lax.fori_loop(0, (places >= 0).sum(), step, zero))


def inner_jaxprs(equation: Any) -> list[Any]:
    """The jaxprs inside an equation of a jaxpr, such as a loop's body or a conditional's branches."""
    found = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, JAXPRS))
    return [getattr(nested, "jaxpr", nested) for nested in found if isinstance(nested, JAXPRS)]


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for nested in inner_jaxprs(equation):
            yield from _equations(nested)


def _bytes(atoms: list[Any]) -> int:
    return sum(atom.aval.size * atom.aval.dtype.itemsize for atom in atoms if hasattr(atom.aval, "dtype"))


def _shapes(tree: PyTree, rows: int) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), tree)


def evaluation_bytes(loss: Callable[[PyTree, PyTree], Any], params: PyTree, examples: PyTree, rows: int) -> int:
    """An estimate of the bytes that ``rows`` more examples add to one forward pass of ``loss``.

    Twice the difference between the bytes of the inputs and outputs of the largest operation for 2·rows examples and
    those for rows examples. Arrays that do not grow with the batch (the weights) cancel.
    """

    def largest(count: int) -> int:
        jaxpr = jax.make_jaxpr(loss)(params, _shapes(examples, count)).jaxpr
        return max((_bytes([*equation.invars, *equation.outvars]) for equation in _equations(jaxpr)), default=0)

    return 2 * max(largest(2 * rows) - largest(rows), 1)


def gradient_bytes(loss: Callable[[PyTree, PyTree], Any], params: PyTree, examples: PyTree, rows: int) -> int:
    """An estimate of the bytes that ``rows`` more examples add to one backward pass of ``loss``.

    The outputs of all operations, since a backward pass keeps them: those for 2·rows examples minus those for rows. It
    is too much where an operation keeps nothing.
    """

    def kept(jaxpr: Any) -> int:
        total = 0
        for equation in jaxpr.eqns:
            inner = sum(map(kept, inner_jaxprs(equation)))
            total += equation.params.get("length", 1) * inner if inner else _bytes(equation.outvars)
        return total

    def of(count: int) -> int:
        return kept(jax.make_jaxpr(loss)(params, _shapes(examples, count)).jaxpr)

    return max(of(2 * rows) - of(rows), 1)


def has_convolution(loss: Callable[[PyTree, PyTree], Any], params: PyTree, examples: PyTree) -> bool:
    """Whether a forward pass of ``loss`` contains a convolution."""
    jaxpr = jax.make_jaxpr(loss)(params, _shapes(examples, 2)).jaxpr
    return any(equation.primitive.name == "conv_general_dilated" for equation in _equations(jaxpr))


def a_device(mesh: Mesh | None) -> jax.Device:
    """A device that the run's programs are compiled for: of the mesh, or a local device if there is no mesh."""
    return jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]


def memory_budget() -> int:
    """The default number of bytes that a cohort may take on one device."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(DEVICE_SHARE * limit)
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(HOST_SHARE * host / jax.local_device_count())


def has_few_parameters(params: PyTree) -> bool:
    """Whether a direction of ``params`` costs almost nothing to make."""
    return _numbers(params) < MANY_PARAMETERS


def _numbers(params: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def keeps_directions(params: PyTree, budget: int | None, copies: int) -> bool:
    """Whether to keep directions for the update: they are expensive to make and their copies fit.

    Args:
      params: the trained parameters; only shapes are read.
      budget: bytes that the cohort may take; None means :func:`memory_budget`.
      copies: float32 copies of the parameters that kept directions need.
    """
    count = _numbers(params)
    return count >= MANY_PARAMETERS and copies * 4 * count <= (memory_budget() if budget is None else budget)


def execution_for(
    loss: Callable[[PyTree, PyTree], Any],
    params: PyTree,
    examples: PyTree,
    batch_size: int,
    *,
    platform: str,
    client_chunk: int | None = None,
    budget: int | None = None,
    model_shards: int = 1,
    backward: bool = False,
) -> Execution:
    """The execution for a model and a machine.

    Args:
      loss: the task's ``(params, batch) → [B]``.
      params: parameters; only shapes and dtypes are read, here and below.
      examples: examples with a leading axis of any length.
      batch_size: examples per client and local step.
      platform: the platform of the devices, ``"cpu"`` or another.
      client_chunk: diverged clients evaluated together, 1 for one by one; a number above 1 also bounds the clients
        whose batches and own parameters exist at the same time. None chooses by platform, model and budget.
      budget: bytes that the cohort may take; None means :func:`memory_budget`.
      model_shards: devices that the parameters are split over.
      backward: whether clients compute gradients.
    """
    budget = memory_budget() if budget is None else budget
    cpu = platform == "cpu"
    # A client's own parameters have the wider dtype, float32 or more.
    own = sum(leaf.size * working_dtype(leaf).itemsize for leaf in jax.tree.leaves(params)) // model_shards
    rows = batch_size * _bytes_of_rows(examples)
    batch = rows + evaluation_bytes(loss, params, examples, batch_size)
    flat = max(1, budget // batch)
    if cpu:
        flat = max(1, min(flat, CPU_FLAT_EXAMPLES // batch_size))
    # A diverged client has its parameters and their next update; a client under evaluation also has a perturbed copy.
    copies = 1
    if backward:
        # Its parameters, their gradient, and the sum of its updates.
        copies, batch = 3, rows + gradient_bytes(loss, params, examples, batch_size)
    stream, vmapped = max(1, budget // 2 // (2 * own + batch)), max(1, budget // 2 // (copies * own + batch))
    if client_chunk is None:
        if cpu:
            vmapped = 1 if has_convolution(loss, params, examples) else min(vmapped, CPU_TOGETHER)
    elif client_chunk == 1:
        vmapped = 1
    else:
        flat, stream, vmapped = min(flat, client_chunk), client_chunk, client_chunk
    return Execution(flat, stream, vmapped, budget // 4 // rows)


def _bytes_of_rows(examples: PyTree) -> int:
    return sum(leaf.size // leaf.shape[0] * leaf.dtype.itemsize for leaf in jax.tree.leaves(examples))
