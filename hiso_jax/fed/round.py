"""One round of scalar-only federated learning as one pure function (HiSo, arXiv 2506.02370, Algorithm 1)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from hiso_jax.fed.aggregate import Aggregate, mean
from hiso_jax.fed.clients import Estimator, Server, client_scalars, fetch
from hiso_jax.fed.execution import Execution, plan
from hiso_jax.fed.mesh import MODEL, over_clients, repeated
from hiso_jax.zo import Method, check_estimator, zo_state


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


Round = Callable[..., tuple[PyTree, Any, RoundRecord]]


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


def make_round(
    task_loss: Callable[[PyTree, Any], Float[Array, "B"]],
    tx: optax.GradientTransformation,
    *,
    local_steps: int,
    num_perturbations: int,
    mu: ArrayLike,
    method: Method = "forward",
    local_learning_rate: optax.ScalarOrSchedule | None = None,
    aggregate: Aggregate = mean,
    client_chunk: int | None = None,
    memory_budget: int | None = None,
    mesh: Mesh | None = None,
    draw: Callable[[PyTree, PyTree], Int[Array, "C K B"]] | None = None,
) -> Round:
    """One round as a pure function: ``(params, state, batches, mask, round_key) → (params, state, RoundRecord)``.

    ``batches`` is a pytree of [C, K, B, ...] arrays, ``mask`` [C] says which clients take part (numbers instead of
    booleans are their weights in the aggregate), and ``state`` is ``tx.init(params)``. A client with a non-finite
    scalar is left out of the round; without a valid client the parameters and the state stay as they were.

    With ``draw`` a cohort's data never exists whole: ``batches`` then is a pytree of rows [C, ...], say the clients'
    numbers, and the round takes a sixth argument ``(examples, source)``. Each device draws for its own clients.

    Args:
      task_loss: ``(params, batch) → float [B]``, the loss of each example.
      tx: an optax transformation headed by ``scale_by_hiso`` or ``scale_by_zo``, applied once to Σ_k Δ_k.
      local_steps: K ≥ 1.
      num_perturbations: P ≥ 1.
      mu: the smoothing radius μ > 0.
      method: ``"forward"`` or ``"central"``.
      local_learning_rate: η of the clients' own steps, plain SGD; a number or a schedule over rounds. Required
        when K > 1.
      aggregate: ``(scalars [C, K, P], weights [C]) → [K, P]``.
      client_chunk: how many diverged clients (K > 1) to evaluate together: 1 maps over them, more are vmapped and
        bound the clients in memory, too. None chooses by backend, model and memory.
      memory_budget: bytes that a cohort may take on a device; None means a share of its memory.
      mesh: a mesh with an axis ``clients``, over which the cohort is split, and perhaps ``model``; see
        :func:`hiso_jax.fed.make_mesh`.
      draw: ``(source, rows [C, ...]) → int32 [C, K, B]``, the numbers of the examples in the rows' batches.

    Raises:
      ValueError: K, P, μ or the method out of range, or K > 1 without ``local_learning_rate``; at the call, a loss
        that is not per example or a state without a zeroth-order head.
    """
    check_estimator(num_perturbations, mu, method)
    if local_steps < 1:
        raise ValueError(f"local_steps must be at least 1, got {local_steps}")
    if local_steps > 1 and local_learning_rate is None:
        raise ValueError(f"local_steps is {local_steps}: the clients' own steps need local_learning_rate")
    optimizer = optax.with_extra_args_support(tx)
    estimator = Estimator(task_loss, local_steps, num_perturbations, mu, method, draw)

    def rate_at(rounds: Int[Array, ""]) -> Any:
        rate = local_learning_rate(rounds) if callable(local_learning_rate) else local_learning_rate
        return 0.0 if rate is None else rate

    def execution_for(server: Server, rows: PyTree) -> Execution:
        def one_batch(server: Server, rows: PyTree) -> PyTree:
            batches = rows if draw is None else draw(server.source, rows)
            return fetch(server.examples, jax.tree.map(lambda a: a[0, 0], batches))

        batch = jax.eval_shape(one_batch, server, rows)
        size = jax.tree.leaves(batch)[0].shape[0]
        shards = 1 if mesh is None else mesh.shape.get(MODEL, 1)
        return plan(
            task_loss,
            server.params,
            batch,
            size,
            client_chunk=client_chunk,
            budget=memory_budget,
            model_shards=shards,
        )

    def run(
        params: PyTree,
        state: optax.OptState,
        batches: PyTree,
        mask: Bool[Array, "C"] | Float[Array, "C"],
        round_key: Key[Array, ""],
        data: tuple[PyTree, PyTree] | None = None,
    ) -> tuple[PyTree, optax.OptState, RoundRecord]:
        head = zo_state(state)
        examples, source = (None, None) if data is None else data
        server = Server(params, head.curvature, round_key, rate_at(head.rounds), examples, source)
        execution = execution_for(server, batches)

        def measure(server: Server, batches: PyTree) -> tuple[Float[Array, "C K P"], Float[Array, "C"]]:
            return client_scalars(estimator, head.directions.sampler, execution, server, batches)

        scalars, losses = over_clients(measure, mesh)(server, batches)
        valid = (mask > 0) & jnp.isfinite(scalars).all((1, 2))
        combined = aggregate(scalars, jnp.where(valid, mask, 0).astype(scalars.dtype))
        params, state = server_update(optimizer, params, state, combined, valid.any(), round_key)
        loss = jnp.where(valid, losses, 0).sum() / valid.sum()
        return params, state, RoundRecord(scalars, valid, combined, loss)

    return repeated(run, mesh)
