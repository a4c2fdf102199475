"""Callbacks that send the evaluations of a run to TensorBoard or Weights & Biases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hiso_jax import fed
from hiso_jax.checks import ParameterError


def _numbers(evaluation: fed.Evaluation) -> dict[str, float]:
    own = {f"test/{name}": value for name, value in evaluation.metrics.items()}
    sent = {"bytes/up": evaluation.bytes_up, "bytes/down": evaluation.bytes_down}
    return {**own, "train/loss": evaluation.train_loss, **sent, "forward_passes": evaluation.forward_passes}


class TensorBoard(fed.Callback):
    """Writes every evaluation for TensorBoard, with the round as step; needs the extra ``tensorboard``.

    Args:
      folder: folder to write; ``tensorboard --logdir`` with it, or with a parent folder, shows the run.

    Raises:
      ValueError: the package tensorboardX is not installed.
    """

    def __init__(self, folder: Path | str) -> None:
        """Create the writer."""
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError as error:
            raise ParameterError(
                "log", "tensorboard needs the extra tensorboard: pip install '.[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(folder))

    def after(self, session: fed.Session, evaluation: fed.Evaluation | None) -> None:
        """Write an evaluation."""
        if evaluation is not None:
            for name, value in _numbers(evaluation).items():
                self._writer.add_scalar(name, value, evaluation.round)
            self._writer.flush()


class WandB(fed.Callback):
    """Sends every evaluation to Weights & Biases, with the round as step; needs the extra ``wandb``.

    Args:
      config: the configuration to show with the run.
      settings: arguments of ``wandb.init``: project, name, mode="offline" …

    Raises:
      ValueError: the package wandb is not installed.
    """

    def __init__(self, config: dict[str, Any] | None = None, **settings: Any) -> None:
        """Begin a run at Weights & Biases."""
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ParameterError("log", "wandb needs the extra wandb: pip install '.[wandb]'") from error
        self._run = wandb.init(config=config, **settings)

    def after(self, session: fed.Session, evaluation: fed.Evaluation | None) -> None:
        """Send an evaluation."""
        if evaluation is not None:
            self._run.log(_numbers(evaluation), step=evaluation.round)

    def end(self, session: fed.Session, result: fed.Result) -> None:
        """End the run at Weights & Biases."""
        self._run.finish()


def loggers(names: tuple[str, ...], folder: Path, config: Mapping[str, Any]) -> list[fed.Callback]:
    """The callbacks with these names.

    Args:
      names: ``tensorboard`` and ``wandb``, or one of them.
      folder: the folder of the run.
      config: the configuration to show with the run.

    Raises:
      ValueError: a package is not installed.
    """
    made: list[fed.Callback] = []
    for name in names:
        made.append(
            TensorBoard(folder / "tensorboard") if name == "tensorboard" else WandB(dict(config), dir=str(folder))
        )
    return made
