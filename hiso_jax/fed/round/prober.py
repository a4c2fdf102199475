"""What a cohort needs to measure along directions."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, PyTree

from hiso_jax.fed.devices import Execution
from hiso_jax.fed.round.inputs import Data, Estimator
from hiso_jax.zo import Deal, Difference, Direction, ScaleByZoState, perturb, probe, rides


class Prober(NamedTuple):
    """All that a cohort needs to measure in a round.

    Attributes:
      estimator: how to measure.
      difference: of which losses.
      execution: how many clients to take through memory at a time.
      data: where batches come from.
      params: x_r.
      head: the optimizer's, which names the directions.
      round_key: from which they are made.
      groups: G, into which the cohort is dealt.
    """

    estimator: Estimator
    difference: Difference
    execution: Execution
    data: Data
    params: PyTree
    head: ScaleByZoState
    round_key: Any
    groups: int

    def gathered(self, batches: PyTree) -> tuple["Prober", PyTree]:
        """The examples of ``batches`` [..., B], if they fit the memory, and the prober that reads such batches.

        Once for all evaluations: an accelerator went through the whole training set for each.
        """
        if self.data.examples is None or math.prod(jax.tree.leaves(batches)[0].shape[:-1]) > self.execution.gathered:
            return self, batches
        return self._replace(data=self.data._replace(examples=None)), self.data.fetch(batches)

    def moved(self, params: PyTree, direction: Direction | None, scale: Any, group: Any) -> PyTree:
        """``params`` moved along a group's direction, or as they are."""
        return params if direction is None else perturb(params, direction.of(group), scale, self.data.moved_as)

    def deal(self, step: int | Array) -> Deal:
        """The directions of a local step."""
        perturbations = self.estimator.num_perturbations
        return self.head.deal(self.round_key, step, self.params, groups=self.groups, num_perturbations=perturbations)

    def shares_products(self) -> bool:
        """Whether groups with directions of their own differ in nothing larger than a vector."""
        z = jax.eval_shape(lambda: self.deal(0).at(0).of(0))
        return rides(self.params, z, self.data.moved_as)

    def run(self, evaluate: Callable, step: int | Array, fold: Callable, init: PyTree) -> tuple[PyTree, Array, PyTree]:
        """:func:`hiso_jax.zo.probe` along the directions of a local step."""
        return probe(
            evaluate,
            self.deal(step).at,
            self.difference,
            num_perturbations=self.estimator.num_perturbations,
            mu=self.estimator.mu,
            fold=fold,
            init=init,
        )
