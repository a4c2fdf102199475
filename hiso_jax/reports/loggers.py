"""A run's evaluations as TensorBoard or Weights & Biases show them: callbacks of a simulation."""

from pathlib import Path
from typing import Any

from hiso_jax import fed
from hiso_jax.checks import ParameterError


def _numbers(evaluation: fed.Evaluation) -> dict[str, float]:
    own = {f"test/{name}": value for name, value in evaluation.metrics.items()}
    sent = {"bytes/up": evaluation.bytes_up, "bytes/down": evaluation.bytes_down}
    return {**own, "train/loss": evaluation.train_loss, **sent, "forward_passes": evaluation.forward_passes}


class TensorBoard:
    """Writes every evaluation for TensorBoard, by the round; needs the extra ``tensorboard``.

    Args:
      folder: where to; ``tensorboard --logdir`` of it, or of a folder above, shows it.

    Raises:
      ValueError: the package tensorboardX is not installed.
    """

    def __init__(self, folder: Path | str) -> None:
        """Make the writer."""
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError as error:
            raise ParameterError(
                "log", "tensorboard needs the extra tensorboard: pip install 'hiso-jax[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(folder))

    def __call__(self, progress: fed.Progress) -> None:
        """Write an evaluation, if there is one."""
        if progress.evaluation is not None:
            for name, value in _numbers(progress.evaluation).items():
                self._writer.add_scalar(name, value, progress.round)
            self._writer.flush()


class WandB:
    """Sends every evaluation to Weights & Biases, by the round; needs the extra ``wandb``.

    Args:
      config: what to say of the run.
      settings: of ``wandb.init``: project, name, mode="offline" …

    Raises:
      ValueError: the package wandb is not installed.
    """

    def __init__(self, config: dict[str, Any] | None = None, **settings: Any) -> None:
        """Begin a run there."""
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ParameterError("log", "wandb needs the extra wandb: pip install 'hiso-jax[wandb]'") from error
        self._run = wandb.init(config=config, **settings)

    def __call__(self, progress: fed.Progress) -> None:
        """Send an evaluation, if there is one; the last ends the run there."""
        if progress.evaluation is not None:
            self._run.log(_numbers(progress.evaluation), step=progress.round)
        if progress.round >= progress.rounds:
            self._run.finish()


def loggers(names: tuple[str, ...], folder: Path, config: dict[str, Any]) -> list[Any]:
    """The callbacks of some names.

    Args:
      names: ``tensorboard`` and ``wandb``, or one of them.
      folder: of the run.
      config: what to say of it.

    Raises:
      ValueError: a package is not installed.
    """
    made: list[Any] = []
    for name in names:
        made.append(TensorBoard(folder / "tensorboard") if name == "tensorboard" else WandB(config, dir=str(folder)))
    return made
