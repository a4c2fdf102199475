"""Estimates from the time that rounds take: the rounds of the next dispatch, and the time left in a run."""

from typing import NamedTuple

from hiso_jax.fed.run.prepared import PreparedRun
from hiso_jax.fed.task import examples_of

# A dispatch is long enough that its overhead does not matter, and short enough to stop or report soon.
DISPATCH_SECONDS = 0.5
# A shorter evaluation is mostly overhead and predicts no round: on the digits, estimates were 15 to 90 times too long.
TELLING_SECONDS = 0.2


class RoundTimes(NamedTuple):
    """Measured times of a run.

    Attributes:
      round_seconds: seconds of a round; None before the first.
      evaluation_seconds: seconds of an evaluation on the test split; 0 before the first.
      passes: forward passes of a client in a round.
    """

    round_seconds: float | None
    evaluation_seconds: float
    passes: int


def next_length(length: int, most: int, round_seconds: float) -> int:
    """The number of rounds of the next dispatch, after a dispatch of ``length`` rounds."""
    # At most double, because the first dispatches are slow for temporary reasons.
    return max(1, min(most, 2 * length, int(DISPATCH_SECONDS / round_seconds)))


def expected_seconds(prepared: PreparedRun, times: RoundTimes, done: int) -> float | None:
    """An estimate of the seconds that a run takes after ``done`` rounds; None if no measured time supports one.

    Before the first round, the estimate takes the time per example from the evaluation, if that took longer than
    ``TELLING_SECONDS``.
    """
    config, each = prepared.config, times.round_seconds
    if each is None and times.evaluation_seconds > TELLING_SECONDS:
        examples = config.answers * config.batch_size * times.passes
        each = examples * times.evaluation_seconds / examples_of(prepared.test)
    if each is None:
        return None
    left = config.rounds - done
    return left * each + -(-left // config.eval_every) * times.evaluation_seconds
