"""Objectives by name: what a run optimises, as in ``--objective`` and ``Experiment``.

An objective is a factory ``name(*, options)`` that returns a function ``(metrics, batch) → [B]``: a value of each
example, from the task's metrics of a batch [B, ...], which the run maximises; or a
:func:`hiso_jax.tasks.text.text_reward`; or None for the task's own loss. Nothing is differentiated along directions, so
a value may have steps: accuracy, exact match, a reward.
"""

from hiso_jax.choices import Kind, defaults
from hiso_jax.fed import Value, ValueOfTask, of_metric

# At 1e-3 the accuracy of a batch seldom changes (``docs/reference/benchmarks/objectives.md``).
MU = 0.1


def loss() -> None:
    """The task's loss, minimised."""


@defaults(mu=MU)
def accuracy() -> Value:
    """The share of correct answers, maximised."""
    return of_metric("accuracy")


@defaults(mu=MU)
def f1() -> Value:
    """The F1 of each generated answer's tokens, maximised."""
    return of_metric("f1")


@defaults(mu=MU)
def exact_match() -> Value:
    """The share of generated answers whose tokens are those of the training target, maximised."""
    return of_metric("exact_match")


OBJECTIVES = Kind(
    "objective",
    {"loss": loss, "accuracy": accuracy, "f1": f1, "exact-match": exact_match},
    returns="function",
    is_valid=lambda made: made is None or callable(made) or isinstance(made, ValueOfTask),
    group="hiso_jax.objectives",
)
