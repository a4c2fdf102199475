"""The result of a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import jax
import optax
from jaxtyping import PyTree

from hiso_jax.extras import import_extra
from hiso_jax.fed.ledger import Evaluation, Records
from hiso_jax.fed.privacy import PrivacySpent
from hiso_jax.renamed import successor

# Metrics, and warnings, that ``repr`` shows at most.
SHOWN = 4


@dataclass(frozen=True, repr=False)
class Result:
    """The result of a run.

    Attributes:
      records: its rounds with their scalars; None if it ran no round.
      metrics: the evaluations, in order.
      initial_params: the initial parameters; with a mesh these, ``params`` and ``state`` are in host memory.
      params: the final parameters.
      state: the final optimizer state.
      rounds: the number of rounds that were run.
      timed_rounds: the number of rounds in ``run_seconds``; below ``rounds`` only if the run was killed and resumed.
      diverged_at: the round at which it diverged, counted from 0, or None.
      interrupted: whether it was stopped before its last round.
      traffic: totals and means of the bytes sent, see :meth:`Traffic.summary`.
      forward_passes: the forward passes of all clients that came.
      compile_seconds: time spent compiling.
      run_seconds: time spent in rounds, without compilation and evaluation.
      simulated_seconds: the time the rounds would have taken the clients; None without a fleet.
      attendance: how many invited clients were absent, dropped out, were late and reported.
      invalid: the number of reports that held a non-finite scalar and were left out.
      health_warnings: a sentence for each problem of the run: reports that were left out, parameters that μ does not
        change, scalars that were only rounding error.
      offset: the mean of a message's scalars in units of their standard deviation, averaged over the run; None if a
        message has fewer than two scalars. Forward differences add μ·tr(∇²f)/2 to every scalar.
      mesh_shape: devices along each axis of the mesh; empty without one.
      privacy: the (ε, δ) that the run has spent; None if the method adds no noise.
      clipped: the share of the valid messages that the server clipped; None for a method that clips none.
      staleness: the ``mean`` and the ``most`` updates that the server made between an invitation and its answer, over
        the answers that counted; None for a synchronous run.
      zeros: the share of the valid scalars that are zero; None for a method without scalars. An objective with steps
        has them where a batch's value does not change at μ.
      spent: seconds of this process on ``compiling``, ``rounds`` and ``evaluations``; a resumed run's earlier processes
        are not in it.
    """

    # Result → the HTML that a notebook shows, or None. The package sets it, because this room knows no reports.
    html: ClassVar[Callable[[Any], str | None]] = staticmethod(lambda result: None)

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
    staleness: dict[str, float] | None = None
    zeros: float | None = None
    spent: Mapping[str, float] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each evaluation: its round, its metrics by name, the training loss, and the costs so far."""
        each = [{one.name: getattr(row, one.name) for one in fields(row)} for row in self.metrics]
        return [{"round": row.pop("round"), **row.pop("metrics"), **row} for row in each]

    def to_pandas(self) -> Any:
        """:meth:`rows` as a ``pandas.DataFrame``.

        Raises:
          ParameterError: pandas is not installed.
        """
        pd = import_extra("pandas", "to_pandas", "cannot be called")
        return pd.DataFrame(self.rows())

    def __repr__(self) -> str:
        """The figures of the run in a few lines; parameters and records are too long."""
        ends = "" if self.diverged_at is None else f", diverged at round {self.diverged_at}"
        lines = [f"Result of {self.rounds:,} rounds{ends}{', interrupted' if self.interrupted else ''}"]
        if self.metrics:
            last = self.metrics[-1]
            shown = ", ".join(f"{name} {value:.4g}" for name, value in list(last.metrics.items())[:SHOWN])
            lines.append(f"round {last.round:,}: {shown}")
        leaves = jax.tree.leaves(self.params)
        lines += [
            f"{self.traffic['bytes_up_per_client']:,.0f} bytes up per client, {self.forward_passes:,} forward passes",
            f"{self.run_seconds:.3g} s in rounds, {self.compile_seconds:.3g} s compiling",
            f"params: {sum(leaf.size for leaf in leaves):,} numbers in {len(leaves):,} arrays",
            *(f"warning: {sentence}" for sentence in self.health_warnings[:SHOWN]),
        ]
        return "\n  ".join(lines)

    def _repr_html_(self) -> str | None:
        return type(self).html(self) if self.metrics else None

    def __getattr__(self, name: str) -> Any:
        """Attributes of earlier releases answer with their successors."""
        raise successor("hiso_jax.fed.Result", name)
