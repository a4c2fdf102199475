"""What the clients of a cohort do in a round: their scalars (HiSo, arXiv 2506.02370, Algorithm 1).

Shapes: C clients, K local steps, P perturbations, B examples a batch. At step 0 every client stands at the server's
parameters, so many clients' examples are one flat batch through one shared set of perturbed weights. From step 1 on
the clients have their own parameters, [C, ...].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree

from hiso_jax.fed.devices import Execution, Gather, in_pieces
from hiso_jax.zo import (
    Ascent,
    Method,
    Sampler,
    add_direction,
    direction,
    perturb,
    perturbation_key,
    scan_perturbations,
    working_dtype,
    zero_direction,
)


class Estimator(NamedTuple):
    """How a client measures: the settings of its scalars.

    Attributes:
      loss: ``(params, batch) → [B]``.
      local_steps: K.
      num_perturbations: P.
      mu: the smoothing radius μ.
      method: forward or central differences.
      draw: ``(source, rows [C, ...]) → int32 [C, K, B]`` if the clients draw their own batches, else None.
    """

    loss: Callable[[PyTree, Any], Float[Array, "B"]]
    local_steps: int
    num_perturbations: int
    mu: Any
    method: Method
    draw: Callable[[PyTree, PyTree], Int[Array, "C K B"]] | None


class Server(NamedTuple):
    """What every client of the round knows.

    Attributes:
      params: x_r.
      curvature: H_r, or None for H = 1.
      round_key: from which the directions are made.
      local_learning_rate: η of the clients' own steps in this round.
      examples: the training examples if the batches are numbers into them, else None.
      source: what ``Estimator.draw`` draws those numbers from.
    """

    params: PyTree
    curvature: PyTree | None
    round_key: Key[Array, ""]
    local_learning_rate: Any
    examples: PyTree | None
    source: PyTree | None


def mean_losses(task_loss: Callable, params: PyTree, examples: PyTree, clients: int = 1) -> Float[Array, "C"]:
    """The mean loss of each of ``clients`` consecutive, equal parts of ``examples``, in float32 or wider."""
    count = jax.tree.leaves(examples)[0].shape[0]
    losses = task_loss(params, examples)
    if losses.shape != (count,):
        raise ValueError(f"a federated task's loss must be per example, shape ({count},) here; got {losses.shape}")
    return losses.astype(jnp.promote_types(losses.dtype, jnp.float32)).reshape(clients, -1).mean(1)


def fetch(examples: PyTree | None, batches: PyTree) -> PyTree:
    """The batches themselves, or the examples they number."""
    return batches if examples is None else jax.tree.map(lambda a: a[batches], examples)


def _at_server(estimator: Estimator, server: Server, batch: PyTree, size: int) -> Callable[[PyTree, Any], Array]:
    """Client losses [C] at shared parameters moved along a direction; ``batch`` [C, B, ...] is evaluated flat."""

    def evaluate(z: PyTree, scale: Any) -> Float[Array, "C"]:
        params = server.params if z is None else perturb(server.params, z, scale)

        def piece(part: PyTree) -> Float[Array, "c"]:
            data = fetch(server.examples, part)
            clients = jax.tree.leaves(data)[0].shape[0]
            return mean_losses(
                estimator.loss, params, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), data), clients
            )

        return in_pieces(piece, batch, size)

    return evaluate


def _at_clients(
    estimator: Estimator, server: Server, local: PyTree, batch: PyTree, size: int
) -> Callable[[PyTree, Any], Array]:
    """Client losses [C] at the clients' own parameters ``local`` [C, ...], all moved along the same direction."""

    def evaluate(z: PyTree, scale: Any) -> Float[Array, "C"]:
        def one(client: tuple[PyTree, PyTree]) -> Float[Array, ""]:
            params, part = client
            data = fetch(server.examples, part)
            return mean_losses(estimator.loss, params if z is None else perturb(params, z, scale), data)[0]

        # Not a vmap of one where one client is asked for: even that makes convolutions grouped.
        if size == 1:
            return lax.map(one, (local, batch))
        return in_pieces(jax.vmap(one), (local, batch), size)

    return evaluate


def _add_outer(deltas: PyTree, z: PyTree, scalars: Float[Array, "C"]) -> tuple[PyTree, Float[Array, "C"]]:
    """Add each client's scalar times the shared direction to its own Σ_p g_p z_p, [C, ...]."""

    # Not as a matrix product, which accelerators would round to fewer bits.
    def add(d: Array, u: Array) -> Array:
        return d + jnp.expand_dims(scalars.astype(u.dtype), range(1, d.ndim)) * u

    return jax.tree.map(add, deltas, z), scalars


class Measured(NamedTuple):
    """What a cohort measured.

    Attributes:
      scalars: every client's, [C, K, P].
      losses: every client's where the round began, [C].
      streamed: ĝ and Δ, made while the directions were at hand, if that was asked for.
    """

    scalars: Float[Array, "C K P"]
    losses: Float[Array, "C"]
    streamed: Ascent | None


def stream_scalars(
    estimator: Estimator,
    sampler: Sampler,
    execution: Execution,
    server: Server,
    rows: PyTree,
    gather: Gather,
    combine: Callable[[Float[Array, "C 1 1"]], Float[Array, "1 1"]],
) -> Measured:
    """As :func:`client_scalars` for K = 1, and Δ with it: each direction is made once.

    The aggregate of a perturbation is known before the next direction is needed, so Δ grows while the directions
    go by, by the arithmetic of ``zo.accumulate``.

    Args:
      estimator: how to measure.
      sampler: the family of raw perturbations.
      execution: how many clients to take through memory at a time.
      server: what the clients know.
      rows: of this device's clients, as in :func:`client_scalars`.
      gather: this device's clients' outputs → all clients'.
      combine: the aggregate of one perturbation's scalars.
    """
    num_perturbations = estimator.num_perturbations

    def fold(delta: PyTree, z: PyTree, own: Float[Array, "c"]) -> tuple[PyTree, tuple[Array, Array]]:
        scalars = gather(own)
        combined = combine(scalars[:, None, None])[0, 0]
        return add_direction(delta, z, combined, num_perturbations), (scalars, combined)

    first = jax.tree.map(lambda a: a[:, 0], _batches(estimator, execution, server, rows))
    delta, losses, (scalars, combined) = scan_perturbations(
        _at_server(estimator, server, first, execution.flat),
        _direction_at(server, sampler, 0),
        num_perturbations=num_perturbations,
        mu=estimator.mu,
        method=estimator.method,
        fold=fold,
        init=zero_direction(server.params),
    )
    return Measured(scalars.T[:, None], gather(losses), Ascent(combined[None], delta))


def _batches(estimator: Estimator, execution: Execution, server: Server, rows: PyTree) -> PyTree:
    """The batches of a whole cohort, or the numbers of their examples, four bytes each."""
    if estimator.draw is None:
        return rows
    draw = estimator.draw
    return in_pieces(lambda piece: draw(server.source, piece), rows, execution.stream)


def _direction_at(server: Server, sampler: Sampler, step: int | Array) -> Callable[[Array], PyTree]:
    return lambda index: direction(
        perturbation_key(server.round_key, step, index), server.params, server.curvature, sampler
    )


def client_scalars(
    estimator: Estimator, sampler: Sampler, execution: Execution, server: Server, rows: PyTree, gather: Gather
) -> Measured:
    """The scalars of every client, and its loss where the round began.

    Args:
      estimator: how to measure.
      sampler: the family of raw perturbations.
      execution: how many clients to take through memory at a time.
      server: what the clients know.
      rows: the batches of this device's clients, [c, K, B, ...] examples; or what ``estimator.draw`` draws them for.
      gather: this device's clients' outputs → all clients'.
    """

    def estimate(evaluate: Callable, step: int | Array, deltas: PyTree | None) -> tuple[PyTree, Array, Array]:
        return scan_perturbations(
            evaluate,
            _direction_at(server, sampler, step),
            num_perturbations=estimator.num_perturbations,
            mu=estimator.mu,
            method=estimator.method,
            # With one local step nobody moves, and there is no [C, ...] copy of the parameters.
            fold=(lambda carry, z, scalars: (carry, scalars)) if deltas is None else _add_outer,
            init=deltas,
        )

    def first_step(batches: PyTree, deltas: PyTree | None) -> tuple[PyTree, Array, Array]:
        first = jax.tree.map(lambda a: a[:, 0], batches)
        return estimate(_at_server(estimator, server, first, execution.flat), 0, deltas)

    def move(x: Array, delta: Array) -> Array:
        # In the wider dtype, which a client's own parameters keep: bfloat16 would lose its steps.
        step = server.local_learning_rate / estimator.num_perturbations
        return (x - step * delta).astype(delta.dtype)

    def all_steps(rows: PyTree) -> tuple[Float[Array, "c K P"], Float[Array, "c"]]:
        batches = rows if estimator.draw is None else estimator.draw(server.source, rows)
        clients = jax.tree.leaves(batches)[0].shape[0]
        zero = jax.tree.map(lambda x: jnp.zeros((clients, *x.shape), working_dtype(x)), server.params)

        def local_step(local: PyTree, inputs: tuple[Int[Array, ""], PyTree]) -> tuple[PyTree, Float[Array, "P c"]]:
            step, batch = inputs
            evaluate = _at_clients(estimator, server, local, batch, execution.together)
            deltas, _, scalars = estimate(evaluate, step, zero)
            return jax.tree.map(move, local, deltas), scalars

        deltas, losses, scalars = first_step(batches, zero)
        local = jax.tree.map(lambda x, delta: move(x[None], delta), server.params, deltas)
        later = jax.tree.map(lambda a: jnp.moveaxis(a[:, 1:], 1, 0), batches)
        _, rest = lax.scan(local_step, local, (jnp.arange(1, estimator.local_steps), later))
        return jnp.transpose(jnp.concatenate([scalars[None], rest]), (2, 0, 1)), losses

    if estimator.local_steps == 1:
        # The directions outside and the clients inside: however many pieces, a direction is made once.
        _, losses, scalars = first_step(_batches(estimator, execution, server, rows), None)
        scalars, losses = gather((scalars.T[:, None], losses))
        return Measured(scalars, losses, None)
    # The clients outside: their own parameters exist for one piece of the cohort at a time.
    scalars, losses = gather(in_pieces(all_steps, rows, execution.stream))
    return Measured(scalars, losses, None)
