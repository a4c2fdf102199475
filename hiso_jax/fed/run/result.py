"""The result of a run."""

from dataclasses import dataclass

import optax
from jaxtyping import PyTree

from hiso_jax.fed.ledger import Evaluation, Records
from hiso_jax.fed.privacy import PrivacySpent


@dataclass(frozen=True)
class Result:
    """What a run leaves behind.

    Attributes:
      records: the scalar log of its rounds; None if it ran no round.
      metrics: the evaluations, in order.
      initial_params: the parameters it began with; these three are in host memory if there was a mesh.
      params: the final parameters.
      state: the final optimizer state.
      rounds: how many rounds were run.
      timed_rounds: of how many ``run_seconds`` tells; fewer than ``rounds`` only if the run was killed and resumed.
      diverged_at: the number of the round at which it diverged, counted from 0, or None.
      interrupted: whether it was stopped before its last round.
      traffic: totals and means of the bytes sent, see :meth:`Traffic.summary`.
      forward_passes: client-loss evaluations, of every client that came.
      compile_seconds: time spent compiling.
      run_seconds: time spent in rounds, without compilation and evaluation.
      simulated_seconds: the time the rounds would have taken the clients; None without a fleet.
      attendance: how many of the invited were absent, dropped out, were late and reported.
      invalid: how many reports held a non-finite scalar and were left out.
      health_warnings: a sentence for each fault of the run: reports that were left out, scalars that were nothing but
        rounding.
      offset: what the scalars of a message have in common, the mean of a message in units of its standard deviation,
        averaged over the run; None of a message of less than two scalars. Forward differences add μ·tr(∇²f)/2 to every
        scalar.
      mesh_shape: devices along each axis of the mesh; empty without one.
      privacy: what the run has told of its clients; None if nothing makes it private.
      clipped: share of the valid messages that were shortened; None of a method that shortens none.
    """

    records: Records | None
    metrics: list[Evaluation]
    initial_params: PyTree
    params: PyTree
    state: optax.OptState
    rounds: int
    timed_rounds: int
    diverged_at: int | None
    interrupted: bool
    traffic: dict[str, float]
    forward_passes: int
    compile_seconds: float
    run_seconds: float
    simulated_seconds: float | None
    attendance: dict[str, int]
    invalid: int
    health_warnings: tuple[str, ...]
    offset: float | None
    mesh_shape: dict[str, int]
    privacy: PrivacySpent | None = None
    clipped: float | None = None
