"""Warnings during a run: reports that are left out, parameters that μ does not change, scalars that are rounding."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from hiso_jax.fed.codes import Coded
from hiso_jax.fed.ledger import Records
from hiso_jax.fed.population import REPORTED
from hiso_jax.fed.run.invitation import Probing, probing_in
from hiso_jax.fed.run.prepared import PreparedRun
from hiso_jax.zo import directional_derivatives, is_half, suggested_mu, unmoved_share

logger = logging.getLogger("hiso_jax")
# A scalar may be rounding error if its difference of losses is at most this many last places of the loss.
LAST_PLACES = 2
# A warning is logged if μ leaves more than this share of the parameters unchanged.
UNMOVED = 0.1
# The scalars to see before the run is judged.
ENOUGH = 20


class HealthWarnings:
    """The warnings about a run's rounds; each is logged when it is seen, and counted for the result.

    Attributes:
      invalid: the number of reports with a non-finite scalar, which were left out.
      first_invalid: the round and the client of the first such report, or None.
      is_rounding: whether most of the first scalars were only rounding error; None until enough are seen.
      about_rounding: the warning that scalars are only rounding error; empty if they are not.
      about_divergence: the warning that the run diverged; empty if it did not.
      about_parameters: the warning that μ does not change parameters in half precision; empty if it does.
    """

    def __init__(
        self,
        mu: float | None,
        dimension: int,
        dtype: Any = None,
        probing: Probing | None = None,
        scale: float | None = None,
        *,
        has_steps: bool = False,
    ) -> None:
        """Begin without warnings.

        Args:
          mu: the smoothing radius; None for a method that does not measure with it.
          dimension: the number of trained parameters.
          dtype: the dtype in which the task computes its loss; None if it is not known.
          probing: client ids → which of them measure with μ; None if all do.
          scale: factor on the scalars of these clients; None is 1.
          has_steps: whether the objective has steps, so that a scalar may be zero because nothing changed.
        """
        self._has_steps = has_steps
        self._probing, self._scale = probing, 1.0 if scale is None else scale
        self.about_parameters, self.about_divergence, self._dtype = "", "", dtype
        self.invalid, self.reports = 0, 0
        self.first_invalid: tuple[int, int] | None = None
        self.is_rounding: bool | None = None
        self.about_rounding = ""
        self._mu, self._dimension = mu, dimension
        self._seen = self._small = 0
        self._loss: float | None = None
        self._said = False

    @classmethod
    def of(cls, prepared: PreparedRun, params: PyTree) -> "HealthWarnings":
        """The warnings about a run before its first round, from the parameters that it begins with."""
        config, measure = prepared.config, prepared.estimator.measure
        warnings = cls(
            config.mu if measure.has_scalars and "mu" in measure.reads else None,
            sum(leaf.size for leaf in jax.tree.leaves(params)),
            prepared.loss_dtype,
            prepared.probing,
            config.probe_scale,
            has_steps=not getattr(prepared.task, "is_differentiable", True),
        )
        warnings.begun(params)
        return warnings

    def begun(self, params: PyTree) -> None:
        """Check the parameters that a run begins with."""
        kinds = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params) if is_half(leaf.dtype)})
        share = unmoved_share(params, self._mu) if kinds and self._mu is not None else 0.0
        if share > UNMOVED:
            self.about_parameters = (
                f"{share:.0%} of the parameters, kept in {' and '.join(kinds)}, are so large that mu = {self._mu:g} "
                "does not move them: keep them in float32, where the model may still compute in fewer bits, or take a "
                "larger mu"
            )
            _warn(self.about_parameters)

    def note(self, records: Records, *, silent: bool = False) -> None:
        """Check some rounds; ``silent`` is for past rounds of a resumed run, whose warnings were logged before."""
        reported = records.attendance == REPORTED
        invalid = reported & ~np.asarray(records.valid)
        self.reports += int(reported.sum())
        self.invalid += int(invalid.sum())
        if invalid.any() and self.first_invalid is None:
            place, client = np.argwhere(invalid)[0]
            self.first_invalid = int(records.round[place]), int(records.cohort[place, client])
        if invalid.any() and not (silent or self._said):
            self._said = True
            _warn(self.about_invalid)
        self._note_rounding(records, silent)

    def evaluated(self) -> None:
        """Allow the warning about reports again; it is logged at most once between evaluations."""
        self._said = False

    def diverged(self, number: int, *, silent: bool = False) -> None:
        """Note that the run ended at round ``number``; ``silent`` is for a resumed run, whose end was logged before."""
        self.about_divergence = (
            f"diverged at round {number}: parameters or losses are not finite, or the losses are a multiple of "
            "the first; the learning rate is probably too high"
        )
        if not silent:
            _warn(self.about_divergence)

    @property
    def sentences(self) -> tuple[str, ...]:
        """All warnings, a sentence each."""
        found = (self.about_divergence, self.about_invalid, self.about_parameters, self.about_rounding)
        return tuple(filter(None, found))

    @property
    def about_invalid(self) -> str:
        """The warning about reports that were left out; empty if all counted."""
        if self.first_invalid is None:
            return ""
        number, client = self.first_invalid
        return (
            f"{self.invalid:,} of {self.reports:,} reports held a number that is not finite and were left out, client "
            f"{client}'s in round {number} first: its data or its loss may be wrong, or the learning rate too high"
        )

    def _note_rounding(self, records: Records, silent: bool) -> None:
        if self._mu is None or self.is_rounding is not None:
            return
        numbers = directional_derivatives(records.scalars)
        losses = np.asarray(records.loss)
        if numbers is None or not np.isfinite(losses).any():
            return
        if self._loss is None:
            self._loss = float(losses[np.isfinite(losses)][0])
        valid, probing = np.asarray(records.valid), probing_in(self._probing, records.cohort)
        if probing is not None:
            valid = valid & probing
        if isinstance(numbers, Coded):
            # The codes of a message of zeros have a step of zero.
            measured = np.asarray(numbers.step)[valid].reshape(-1)
        else:
            measured = np.abs(np.asarray(numbers, np.float64))[valid].reshape(-1)
        loss = np.broadcast_to(losses.astype(np.float64)[:, None], valid.shape)[valid]
        dtype = self._dtype if self._dtype is not None and is_half(self._dtype) else losses.dtype
        places = 0 if self._has_steps else LAST_PLACES
        least = places * float(jnp.finfo(dtype).eps) * np.abs(loss) / self._mu * self._scale
        each = len(measured) // max(len(loss), 1)
        self._seen += len(measured)
        self._small += int((measured <= np.repeat(least, each)).sum())
        if self._seen < ENOUGH:
            return
        self.is_rounding = 2 * self._small > self._seen
        if not self.is_rounding:
            return
        what = "messages" if isinstance(numbers, Coded) else "scalars"
        if self._has_steps:
            self.about_rounding = (
                f"mu is too small for this objective: at {self._mu:g}, {self._small} of the first {self._seen} {what} "
                "are zero, because the value of a batch did not change; take a larger mu, or larger batches"
            )
            if not silent:
                _warn(self.about_rounding)
            return
        better = suggested_mu(self._loss, dtype, self._dimension)
        self.about_rounding = (
            f"mu is too small for losses in {dtype}: at {self._mu:g}, {self._small} of the first {self._seen} "
            f"{what} are within the rounding of the loss; {better:g} suits a loss of {self._loss:.3g} and "
            f"{self._dimension:,} parameters better"
        )
        if not silent:
            _warn(self.about_rounding)


def _warn(sentence: str) -> None:
    if jax.process_index() == 0:
        logger.warning("%s", sentence)
