"""How long rounds take: how many to run in one dispatch, and when a run will be over."""

from typing import NamedTuple

from hiso_jax.fed.run.prepared import PreparedRun
from hiso_jax.fed.task import examples_of

# A dispatch is made long enough for its overhead not to matter and short enough to stop or report soon.
DISPATCH_SECONDS = 0.5
# What took less was not spent on examples, and says nothing of rounds: on the digits 15 to 90 times too much was told.
TELLING_SECONDS = 0.2


class RoundTimes(NamedTuple):
    """What was measured of a run.

    Attributes:
      round_seconds: of a round; None before the first.
      evaluation_seconds: of an evaluation on the test split; 0 if none was made.
      passes: evaluations of its loss that a client makes in a round.
    """

    round_seconds: float | None
    evaluation_seconds: float
    passes: int


def next_length(length: int, most: int, round_seconds: float) -> int:
    """How many rounds the next dispatch should have, after one of ``length``."""
    # At most double: the first dispatches are slow for reasons that pass.
    return max(1, min(most, 2 * length, int(DISPATCH_SECONDS / round_seconds)))


def expected_seconds(prepared: PreparedRun, times: RoundTimes, done: int) -> float | None:
    """About how long the rest of a run takes after ``done`` rounds; None where there is nothing to tell it by.

    Before the first round a round is taken to cost, example for example, what the evaluation has cost, if that took a
    while.
    """
    config, each = prepared.config, times.round_seconds
    if each is None and times.evaluation_seconds > TELLING_SECONDS:
        examples = config.cohort * config.batch_size * times.passes
        each = examples * times.evaluation_seconds / examples_of(prepared.test)
    if each is None:
        return None
    left = config.rounds - done
    return left * each + -(-left // config.eval_every) * times.evaluation_seconds
