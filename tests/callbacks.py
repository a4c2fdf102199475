"""Callbacks that tests need."""

from hiso_jax import fed


class StopAt(fed.Callback):
    """A callback that ends a run after a number of rounds; None lets the run continue."""

    def __init__(self, rounds: int | None) -> None:
        super().__init__(lambda session, _: rounds is not None and session.round >= rounds and session.stop())


class Dispatches(fed.Callback):
    """A callback that records the first round of a run, the rounds after every dispatch, and the evaluations."""

    def __init__(self) -> None:
        self.begun = -1
        self.rounds: list[int] = []
        self.evaluations: list[fed.Evaluation] = []

    def begin(self, session: fed.Session) -> None:
        self.begun = session.round

    def after(self, session: fed.Session, evaluation: fed.Evaluation | None) -> None:
        self.rounds.append(session.round)
        self.evaluations += [] if evaluation is None else [evaluation]
