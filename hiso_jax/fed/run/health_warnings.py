"""What a run says while it goes: reports that had to be left out, and scalars that are nothing but rounding."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from hiso_jax.fed.codes import Coded
from hiso_jax.fed.ledger import Records
from hiso_jax.fed.population import REPORTED
from hiso_jax.zo import directional_derivatives, is_half, suggested_mu, unmoved_share

logger = logging.getLogger("hiso_jax")
# A scalar of so few of the last place of the loss it was measured on is not told from rounding.
LAST_PLACES = 2
# Share of the parameters that do not move by μ, from which on it is said.
UNMOVED = 0.1
# Scalars seen before a run is judged by them.
ENOUGH = 20


class HealthWarnings:
    """What there is to say of a run's rounds; each thing is said when it is seen, and counted for the end.

    Attributes:
      invalid: reports with a number that is not finite, which were left out.
      first_invalid: the round and the client of the first of them, or None.
      is_rounding: whether the first scalars were nothing but rounding; None until enough are seen.
      about_rounding: that in a sentence; empty if they were not.
      about_parameters: that parameters of half precision do not move by μ, in a sentence; empty if they do.
    """

    def __init__(self, mu: float | None, dimension: int, dtype: Any = None) -> None:
        """Nothing yet.

        Args:
          mu: the smoothing radius of a method that measures by it, else None.
          dimension: how many parameters are trained.
          dtype: in which the task computes its loss; None where that is not known.
        """
        self.about_parameters, self._dtype = "", dtype
        self.invalid, self.reports = 0, 0
        self.first_invalid: tuple[int, int] | None = None
        self.is_rounding: bool | None = None
        self.about_rounding = ""
        self._mu, self._dimension = mu, dimension
        self._seen = self._small = 0
        self._loss: float | None = None
        self._said = False

    def begun(self, params: PyTree) -> None:
        """Look at the parameters that a run begins with."""
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
        """Look at some rounds; ``silent`` for those of a run that goes on, which said it then."""
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
        """What was said may be said again: once between evaluations is enough."""
        self._said = False

    @property
    def sentences(self) -> tuple[str, ...]:
        """All that there is to say."""
        return tuple(filter(None, (self.about_invalid, self.about_parameters, self.about_rounding)))

    @property
    def about_invalid(self) -> str:
        """How many reports were left out, in a sentence; empty if none was."""
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
        valid = np.asarray(records.valid)
        if isinstance(numbers, Coded):
            # Codes of a message of zeros have a step of zero.
            measured = np.asarray(numbers.step)[valid].reshape(-1)
        else:
            measured = np.abs(np.asarray(numbers, np.float64))[valid].reshape(-1)
        loss = np.broadcast_to(losses.astype(np.float64)[:, None], valid.shape)[valid]
        dtype = self._dtype if self._dtype is not None and is_half(self._dtype) else losses.dtype
        least = LAST_PLACES * float(jnp.finfo(dtype).eps) * np.abs(loss) / self._mu
        each = len(measured) // max(len(loss), 1)
        self._seen += len(measured)
        self._small += int((measured <= np.repeat(least, each)).sum())
        if self._seen < ENOUGH:
            return
        self.is_rounding = 2 * self._small > self._seen
        if not self.is_rounding:
            return
        better = suggested_mu(self._loss, dtype, self._dimension)
        what = "messages" if isinstance(numbers, Coded) else "scalars"
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
