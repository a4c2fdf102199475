"""One round as a pure function, for custom training loops."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Key, PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.fed.algorithm import Algorithm, as_algorithm, measured_by
from hiso_jax.fed.devices import ExecutionSettings
from hiso_jax.fed.keys import CHANNEL_STREAM
from hiso_jax.fed.ledger import RoundRecord
from hiso_jax.fed.measure import Cohort, Estimator, Keys, Mixed
from hiso_jax.fed.round.channel import first_memory
from hiso_jax.fed.round.round import Loss, RoundInputs, server_round
from hiso_jax.fed.update import ServerState
from hiso_jax.renamed import with_known_names
from hiso_jax.zo import Difference, DifferenceName, fold_in

DEFAULT = ExecutionSettings()


class Aside(NamedTuple):
    """Inputs of a round that are not known to all clients.

    Attributes:
      hostile: mask of the clients whose messages the algorithm's attack forges, [C]; None is no client.
      secret: a key of this round that no public value reveals, for an algorithm with private noise.
      probing: mask of the clients that cannot backpropagate, for the measure ``fed.mixed()``, [C]; None is no client.
    """

    hostile: Bool[Array, "C"] | None = None
    secret: Key[Array, ""] | None = None
    probing: Bool[Array, "C"] | None = None


NOTHING = Aside()


@with_known_names
def make_round(
    task_loss: Loss,
    tx: Algorithm | optax.GradientTransformation,
    *,
    local_steps: int,
    num_perturbations: int,
    mu: ArrayLike,
    difference: Difference | DifferenceName | None = None,
    local_learning_rate: optax.ScalarOrSchedule | None = None,
    execution: ExecutionSettings = DEFAULT,
) -> Callable[..., tuple[PyTree, Any, RoundRecord]]:
    """One round as a pure function: ``(params, state, batches, mask, round_key) → (params, state, RoundRecord)``.

    ``batches`` is a pytree of [C, K, B, ...] arrays. ``mask`` [C] says which clients take part: booleans, or weights in
    the aggregate, where a weight that is not positive excludes the client. ``state`` is ``tx.init(params)``. A client
    whose message has a non-finite value is left out of the round; without a valid client, the parameters and the state
    do not change. The client ids are the places in ``mask``.

    The round has three keyword arguments. ``frozen=`` holds parameters that are not trained; the loss is then called
    as ``loss(params, batch, frozen)``. ``round_number=`` is read by schedules of methods without scalars. ``aside=`` is
    an :class:`Aside`, for algorithms with an attack or private noise.

    Args:
      task_loss: ``(params, batch) → float [B]``, the loss of each example.
      tx: an :class:`hiso_jax.fed.Algorithm`; or an optax transformation with the head ``scale_by_hiso`` or
        ``scale_by_zo``, applied once to Σ_k Δ_k of the mean scalars. For an algorithm whose combiner or clipping has a
        memory, ``state`` is the pair of ``tx.init(params)`` and :func:`hiso_jax.fed.first_memory`.
      local_steps: K ≥ 1.
      num_perturbations: P ≥ 1.
      mu: the smoothing radius μ > 0.
      difference: ``"forward"`` (the default), ``"central"`` or another difference; not for an algorithm that has its
        own measure.
      local_learning_rate: η of the clients' own steps, plain SGD; a number or a schedule over rounds. Required
        when K > 1, if the algorithm's clients measure along directions.
      execution: how the round is computed.

    Raises:
      ValueError: K, P, μ, the difference or ``directions`` is out of range, directions are kept for K > 1, or K > 1
        without ``local_learning_rate``; at the call, the loss is not per example, the state has no zeroth-order head,
        or a member of the optimizer before the head needs the parameters.
    """
    algorithm = as_algorithm(tx)
    measure = measured_by(algorithm, difference)
    estimator = Estimator(measure, local_steps, num_perturbations, mu, local_learning_rate)
    core = server_round(task_loss, algorithm, estimator, execution)
    has_memory = algorithm.combine.init is not None or any(clip.init is not None for clip in algorithm.rescale)

    def run(
        params: PyTree,
        state: PyTree,
        batches: PyTree,
        mask: Bool[Array, "C"] | Float[Array, "C"],
        round_key: Key[Array, ""],
        *,
        frozen: PyTree | None = None,
        round_number: ArrayLike = 0,
        aside: Aside = NOTHING,
    ) -> tuple[PyTree, PyTree, RoundRecord]:
        if aside.probing is not None and not isinstance(measure, Mixed):
            raise ParameterError("aside", "must have `probing` only for the measure of a mixed cohort, fed.mixed()")
        own, memory = state if has_memory else (state, first_memory(algorithm, ()))
        weights = mask.astype(jnp.float32) if mask.dtype == bool else jnp.where(mask > 0, mask, 0)
        cohort = Cohort(jnp.arange(len(mask)), weights, batches, aside.hostile, aside.probing)
        channel = fold_in(round_key, jnp.uint32(CHANNEL_STREAM))
        keys = Keys(round_key, channel, jnp.asarray(round_number, jnp.int32), aside.secret)
        server, record = core(ServerState(params, own, memory), cohort, keys, RoundInputs(frozen=frozen))
        record = record._replace(loss=jnp.where(record.valid.any(), record.loss, jnp.nan))
        return server.params, (server.state, server.memory) if has_memory else server.state, record

    return run
