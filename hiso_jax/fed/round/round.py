"""One round of scalar-only federated learning as one pure function (HiSo, arXiv 2506.02370, Algorithm 1)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from hiso_jax.fed.algorithm import SEPARABLE, Aggregate, mean
from hiso_jax.fed.devices import MODEL, Execution, Gather, keeps_directions, over_clients, plan, repeated
from hiso_jax.fed.ledger import RoundRecord
from hiso_jax.fed.round.probes import Estimator, Measured, Server, client_scalars, fetch, stream_scalars
from hiso_jax.fed.task import bind
from hiso_jax.fed.update import server_update
from hiso_jax.zo import (
    DirectionsMode,
    Method,
    check_chain,
    check_directions,
    check_estimator,
    zo_state,
)

Round = Callable[..., tuple[PyTree, Any, RoundRecord]]


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
    directions: DirectionsMode | None = None,
) -> Round:
    """One round as a pure function: ``(params, state, batches, mask, round_key) → (params, state, RoundRecord)``.

    ``batches`` is a pytree of [C, K, B, ...] arrays, ``mask`` [C] says which clients take part (numbers instead of
    booleans are their weights in the aggregate), and ``state`` is ``tx.init(params)``. A client with a non-finite
    scalar is left out of the round; without a valid client the parameters and the state stay as they were.

    With ``draw`` a cohort's data never exists whole: ``batches`` then is a pytree of rows [C, ...], say the clients'
    numbers, and the round takes a sixth argument ``(examples, source)``. Each device draws for its own clients.

    Parameters that are not trained are a keyword argument of the round, ``frozen=``: the loss is then called as
    ``loss(params, batch, frozen)``.

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
      directions: ``"keep"`` makes each direction once, for all clients and the update, and needs two copies of the
        trained parameters beside them; ``"regenerate"`` makes it again for the update and needs one. The same bits.
        None keeps them if K = 1, the aggregate takes the perturbations one by one, they are many and memory permits.

    Raises:
      ValueError: K, P, μ, the method or ``directions`` out of range, ``"keep"`` with K > 1 or an aggregate that needs
        all perturbations, or K > 1 without ``local_learning_rate``; at the call, a loss that is not per example, a
        state without a zeroth-order head, or an optimizer whose members before the head need the parameters.
    """
    check_estimator(num_perturbations, mu, method)
    if local_steps < 1:
        raise ValueError(f"local_steps must be at least 1, got {local_steps}")
    if local_steps > 1 and local_learning_rate is None:
        raise ValueError(f"local_steps is {local_steps}: the clients' own steps need local_learning_rate")
    streamable = local_steps == 1 and aggregate in SEPARABLE
    if directions is not None:
        check_directions(directions)
    if directions == "keep" and not streamable:
        raise ValueError("directions must be regenerate for several local steps or an aggregate other than the mean")
    optimizer = optax.with_extra_args_support(tx)

    def rate_at(rounds: Int[Array, ""]) -> Any:
        rate = local_learning_rate(rounds) if callable(local_learning_rate) else local_learning_rate
        return 0.0 if rate is None else rate

    def execution_for(estimator: Estimator, server: Server, rows: PyTree) -> Execution:
        def one_batch(server: Server, rows: PyTree) -> PyTree:
            batches = rows if draw is None else draw(server.source, rows)
            return fetch(server.examples, jax.tree.map(lambda a: a[0, 0], batches))

        batch = jax.eval_shape(one_batch, server, rows)
        size = jax.tree.leaves(batch)[0].shape[0]
        shards = 1 if mesh is None else mesh.shape.get(MODEL, 1)
        return plan(
            estimator.loss,
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
        frozen: PyTree | None = None,
    ) -> tuple[PyTree, optax.OptState, RoundRecord]:
        head = zo_state(state)
        examples, source = (None, None) if data is None else data
        estimator = Estimator(bind(task_loss, frozen), local_steps, num_perturbations, mu, method, draw)
        server = Server(params, head.curvature, round_key, rate_at(head.rounds), examples, source)
        execution = execution_for(estimator, server, batches)
        keep = directions == "keep"
        if directions is None and streamable:
            keep = keeps_directions(params, memory_budget)

        def combine(scalars: Float[Array, "C k p"], counts: Bool[Array, "C"]) -> Float[Array, "k p"]:
            return aggregate(scalars, jnp.where(counts, mask, 0).astype(scalars.dtype))

        def measure(server: Server, batches: PyTree, gather: Gather) -> Measured:
            sampler = head.directions.sampler
            if not keep:
                return client_scalars(estimator, sampler, execution, server, batches, gather)
            # As if all were valid: what turns out not to be is made again.
            everyone = partial(combine, counts=mask > 0)
            return stream_scalars(estimator, sampler, execution, server, batches, gather, everyone)

        measured = over_clients(measure, mesh)(server, batches)
        scalars = measured.scalars
        valid = (mask > 0) & jnp.isfinite(scalars).all((1, 2))
        combined, ascent = combine(scalars, valid), measured.streamed
        check_chain(optimizer, params, combined)
        if ascent is not None:
            # The same bits, and told to be: two programs may sum in different ways.
            combined = jnp.where((valid == (mask > 0)).all(), ascent.scalars, combined)
        params, state = server_update(optimizer, params, state, combined, valid.any(), round_key, ascent)
        loss = jnp.where(valid, measured.losses, 0).sum() / valid.sum()
        return params, state, RoundRecord(scalars, valid, combined, loss)

    return repeated(run, mesh)
