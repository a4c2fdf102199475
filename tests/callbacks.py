"""Callbacks that tests need."""

from hiso_jax import fed


class StopAt(fed.Callback):
    """Ends a run after so many rounds; None lets it go on."""

    def __init__(self, rounds: int | None) -> None:
        super().__init__(lambda session, _: rounds is not None and session.round >= rounds and session.stop())


class Dispatches(fed.Callback):
    """Keeps the round at which a run begins, the rounds after every dispatch, and the evaluations."""

    def __init__(self) -> None:
        self.begun = -1
        self.rounds: list[int] = []
        self.evaluations: list[fed.Evaluation] = []

    def begin(self, session: fed.Session) -> None:
        self.begun = session.round

    def after(self, session: fed.Session, evaluation: fed.Evaluation | None) -> None:
        self.rounds.append(session.round)
        self.evaluations += [] if evaluation is None else [evaluation]
