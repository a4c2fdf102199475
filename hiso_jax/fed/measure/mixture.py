"""Mixed cohorts: some clients backpropagate and project, the others can only run the model forward.

Both send P scalars along the round's directions, in one form of message. A client without backpropagation takes one
step and measures finite differences, whatever K is. Its scalars are slopes where the round began, while the progress of
K local steps is shorter, because gradients shrink along the way. A factor γ brings the slopes to the scale of the
progress. Without it the steepest messages would decide the round.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from hiso_jax.checks import ParameterError, positive
from hiso_jax.fed.devices import Part
from hiso_jax.fed.measure.context import Cohort, Estimator, Measured, RoundContext
from hiso_jax.fed.measure.probes import Probes
from hiso_jax.fed.measure.projections import Projections
from hiso_jax.zo import Ascent, Difference, DifferenceName, as_difference


@dataclass(frozen=True)
class Mixed:
    """Projections of clients that can backpropagate, and finite differences of the others, see :attr:`Cohort.probing`.

    Attributes:
      projections: the measure of the clients that backpropagate.
      probes: that of the others.
      scale: γ, the factor on the scalars of the others; None: the server finds it in every round from the messages, the
        ratio of the median lengths of the two kinds, at most 1, if K > 1.

    Raises:
      ParameterError: ``scale`` is not positive, or a direction has several estimates.
    """

    projections: Projections = field(default_factory=Projections)
    probes: Probes = field(default_factory=lambda: Probes(as_difference("forward")))
    scale: float | None = None
    has_scalars: ClassVar[bool] = True
    backpropagates: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("perturbations", "mu", "difference", "local_learning_rate")

    def __post_init__(self) -> None:
        """Check γ and the differences."""
        if self.scale is not None:
            positive("probe_scale", self.scale)
        if not self.probes.difference.has_one_estimate:
            raise ParameterError(
                "difference", "must make one derivative estimate for each direction, as projections do"
            )

    @property
    def description(self) -> list[Any]:
        """The two measures, and γ."""
        return [self.projections.description, self.probes.description, self.scale]

    def is_balanced(self, local_steps: int) -> bool:
        """Whether the server scales the messages of the two kinds to one length. Both are gradients at K = 1."""
        return self.scale is None and local_steps > 1

    def check(self, estimator: Estimator, directions: str | None) -> None:
        """Refuse what does not suit the projections.

        Raises:
          ParameterError: see :meth:`Projections.check`.
        """
        self.projections.check(estimator, directions)

    def passes(self, local_steps: int, num_perturbations: int) -> int:
        """The cost of a client that backpropagates."""
        return self.projections.passes(local_steps, num_perturbations)

    def directions(self, local_steps: int, num_perturbations: int) -> int:
        """P, for every client."""
        return num_perturbations

    def message_shapes(self, estimator: Estimator, params: PyTree, clients: int, dtype: Any) -> PyTree:
        """Scalars [C, 1, P]."""
        return self.projections.message_shapes(estimator, params, clients, dtype)

    def measure(self, context: RoundContext, cohort: Cohort, part: Part) -> Measured:
        """Each client's own measure. The program computes both for every client, which is more than its clients would.

        Without a mask of probing clients all of them project.
        """
        probing = context.cohort.probing
        progress = self.projections.measure(context, cohort, part)
        if probing is None:
            return progress
        settings = context.settings._replace(directions="regenerate")
        # Complete messages, because they are scaled; and one local step.
        alone = context._replace(estimator=context.estimator._replace(local_steps=1), settings=settings, relay=None)
        slopes = self.probes.measure(alone, cohort, part)

        def chosen(slope: Array, projected: Array) -> Array:
            own = slope.astype(projected.dtype) * jnp.asarray(self.scale or 1.0, projected.dtype)
            return jnp.where(jnp.expand_dims(probing, range(1, own.ndim)), own, projected)

        messages = jax.tree.map(chosen, slopes.messages, progress.messages)
        return Measured(messages, jnp.where(probing, slopes.losses, progress.losses))

    def ascent(self, context: RoundContext, measured: Measured, aggregate: PyTree) -> Ascent | None:
        """None: Δ is made again."""
        return None


def mixed(
    measure: Projections | None = None, difference: Difference | DifferenceName = "forward", scale: float | None = None
) -> Mixed:
    """A cohort in which some clients project and the others measure finite differences, see :class:`Mixed`."""
    return Mixed(measure or Projections(), Probes(as_difference(difference)), scale)
