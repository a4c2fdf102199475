"""One round of scalar-only federated learning as one pure function (HiSo, arXiv 2506.02370, Algorithm 1).

Shapes: C clients in the cohort, K local steps, P perturbations, B examples a batch.
At step 0 every client stands at the server's parameters, so the cohort's C·B examples are one flat batch through
one shared set of perturbed weights. From step 1 on the clients have their own parameters, [C, ...].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from hiso_jax.fed.aggregate import Aggregate, mean
from hiso_jax.zo import (
    Method,
    check_estimator,
    direction,
    perturb,
    perturbation_key,
    scan_perturbations,
    working_dtype,
    zo_state,
)


class RoundRecord(NamedTuple):
    """What a round leaves behind; with the round key it is all that a replay needs.

    Attributes:
      scalars: each client's scalars, [C, K, P].
      valid: which clients reported and sent finite scalars only, [C].
      aggregate: ĝ, the aggregate that was applied, [K, P].
      loss: the mean loss of the valid clients at the round's start, NaN if there is none.
    """

    scalars: Float[Array, "C K P"]
    valid: Bool[Array, "C"]
    aggregate: Float[Array, "K P"]
    loss: Float[Array, ""]


Round = Callable[[PyTree, Any, PyTree, Any, Any], tuple[PyTree, Any, RoundRecord]]


def server_update(
    tx: optax.GradientTransformationExtraArgs,
    params: PyTree,
    state: optax.OptState,
    aggregate: Float[Array, "K P"],
    any_valid: Bool[Array, ""],
    round_key: Key[Array, ""],
) -> tuple[PyTree, optax.OptState]:
    """Apply an aggregate to parameters and optimizer state, or leave both if no client was valid.

    The run and every replay call this same function. As a branch of a conditional it is also compiled apart from
    what stands around it, which keeps its bits the same in both.
    """

    def apply(operands: tuple[PyTree, Any]) -> tuple[PyTree, Any]:
        params, state = operands
        updates, state = tx.update(aggregate, state, params, key=round_key)
        return optax.apply_updates(params, updates), state

    return lax.cond(any_valid, apply, lambda operands: operands, (params, state))


def _mean_loss(task_loss: Callable, params: PyTree, examples: PyTree, clients: int = 1) -> Float[Array, "C"]:
    """The mean loss of each of ``clients`` consecutive, equal parts of ``examples``, in float32 or wider."""
    count = jax.tree.leaves(examples)[0].shape[0]
    losses = task_loss(params, examples)
    if losses.shape != (count,):
        raise ValueError(f"a federated task's loss must be per example, shape ({count},) here; got {losses.shape}")
    return losses.astype(jnp.promote_types(losses.dtype, jnp.float32)).reshape(clients, -1).mean(1)


def _at_server(task_loss: Callable, params: PyTree, batch: PyTree) -> Callable[[PyTree, Any], Float[Array, "C"]]:
    """Client losses at shared parameters moved along a direction; ``batch`` [C, B, ...] is evaluated flat."""
    clients = jax.tree.leaves(batch)[0].shape[0]
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), batch)
    return lambda z, scale: _mean_loss(task_loss, params if z is None else perturb(params, z, scale), flat, clients)


def _at_clients(
    task_loss: Callable, local: PyTree, batch: PyTree, chunk: int | None
) -> Callable[[PyTree, Any], Float[Array, "C"]]:
    """Client losses at the clients' own parameters ``local`` [C, ...], all moved along the same direction."""

    def evaluate(z: PyTree, scale: Any) -> Float[Array, "C"]:
        def one(client: tuple[PyTree, PyTree]) -> Float[Array, ""]:
            params, examples = client
            return _mean_loss(task_loss, params if z is None else perturb(params, z, scale), examples)[0]

        if chunk is None:
            return jax.vmap(one)((local, batch))
        # Not a batch of one where one client is asked for: even that vmap makes convolutions grouped.
        return lax.map(one, (local, batch), batch_size=None if chunk == 1 else chunk)

    return evaluate


def _add_outer(deltas: PyTree, z: PyTree, scalars: Float[Array, "C"]) -> PyTree:
    """Add each client's scalar times the shared direction to its own Σ_p g_p z_p, [C, ...]."""
    return jax.tree.map(lambda d, u: d + jnp.tensordot(scalars.astype(u.dtype), u, 0), deltas, z)


def make_round(
    task_loss: Callable[[PyTree, Any], Float[Array, "B"]],
    tx: optax.GradientTransformation,
    *,
    local_steps: int,
    num_perturbations: int,
    mu: float,
    method: Method = "forward",
    local_learning_rate: optax.ScalarOrSchedule | None = None,
    aggregate: Aggregate = mean,
    client_chunk: int | None = None,
) -> Round:
    """One round as a pure function: ``(params, state, batches, mask, round_key) → (params, state, RoundRecord)``.

    ``batches`` is a pytree of [C, K, B, ...] arrays, ``mask`` [C] says which clients take part, and ``state`` is
    ``tx.init(params)``. A client with a non-finite scalar is left out of the round; without a valid client the
    parameters and the state stay as they were.

    Args:
      task_loss: ``(params, batch) → float [B]``, the loss of each example.
      tx: an optax transformation headed by ``scale_by_hiso`` or ``scale_by_zo``, applied once to Σ_k Δ_k.
      local_steps: K ≥ 1.
      num_perturbations: P ≥ 1.
      mu: the smoothing radius μ > 0.
      method: ``"forward"`` or ``"central"``.
      local_learning_rate: η of the clients' own steps, plain SGD; a number or a schedule over rounds. Required
        when K > 1.
      aggregate: ``(scalars [C, K, P], valid [C]) → [K, P]``.
      client_chunk: how many diverged clients (K > 1) to evaluate at a time: 1 maps over them, C vmaps. None means
        1 on CPU, where a vmapped convolution becomes a slow grouped one, and all of them elsewhere.

    Raises:
      ValueError: K, P, μ or the method out of range, or K > 1 without ``local_learning_rate``; at the call, a loss
        that is not per example or a state without a zeroth-order head.
    """
    check_estimator(num_perturbations, mu, method)
    if local_steps < 1:
        raise ValueError(f"local_steps must be at least 1, got {local_steps}")
    if local_steps > 1 and local_learning_rate is None:
        raise ValueError(f"local_steps is {local_steps}: the clients' own steps need local_learning_rate")
    server = optax.with_extra_args_support(tx)

    def rate_at(rounds: Int[Array, ""]) -> Any:
        return local_learning_rate(rounds) if callable(local_learning_rate) else local_learning_rate

    def estimate(evaluate: Callable, direction_at: Callable, deltas: PyTree | None) -> tuple[PyTree, Array, Array]:
        return scan_perturbations(
            evaluate,
            direction_at,
            num_perturbations=num_perturbations,
            mu=mu,
            method=method,
            # With one local step nobody moves, and there is no [C, ...] copy of the parameters.
            fold=_add_outer if local_steps > 1 else lambda carry, z, scalars: carry,
            init=deltas,
        )

    def run(
        params: PyTree, state: optax.OptState, batches: PyTree, mask: Bool[Array, "C"], round_key: Key[Array, ""]
    ) -> tuple[PyTree, optax.OptState, RoundRecord]:
        head = zo_state(state)
        chunk = client_chunk or (1 if jax.default_backend() == "cpu" else None)

        def direction_at(step: int | Array) -> Callable[[Array], PyTree]:
            return lambda index: direction(
                perturbation_key(round_key, step, index), params, head.curvature, head.directions.sampler
            )

        def move(x: Array, delta: Array) -> Array:
            return (x - rate_at(head.rounds) / num_perturbations * delta).astype(x.dtype)

        def local_step(local: PyTree, inputs: tuple[Array, PyTree]) -> tuple[PyTree, Float[Array, "P C"]]:
            step, batch = inputs
            deltas, _, scalars = estimate(_at_clients(task_loss, local, batch, chunk), direction_at(step), zero)
            return jax.tree.map(move, local, deltas), scalars

        zero = None
        if local_steps > 1:
            zero = jax.tree.map(lambda x: jnp.zeros((*mask.shape, *x.shape), working_dtype(x)), params)
        first = jax.tree.map(lambda a: a[:, 0], batches)
        deltas, losses, scalars = estimate(_at_server(task_loss, params, first), direction_at(0), zero)
        steps = scalars[None]
        if local_steps > 1:
            local = jax.tree.map(lambda x, delta: move(x[None], delta), params, deltas)
            later = jax.tree.map(lambda a: jnp.moveaxis(a[:, 1:], 1, 0), batches)
            steps = jnp.concatenate([steps, lax.scan(local_step, local, (jnp.arange(1, local_steps), later))[1]])

        all_scalars = jnp.transpose(steps, (2, 0, 1))
        valid = mask & jnp.isfinite(all_scalars).all((1, 2))
        combined = aggregate(all_scalars, valid)
        params, state = server_update(server, params, state, combined, valid.any(), round_key)
        loss = jnp.where(valid, losses, 0).sum() / valid.sum()
        return params, state, RoundRecord(all_scalars, valid, combined, loss)

    return run
