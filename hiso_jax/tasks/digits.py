"""The UCI 8×8 handwritten digits, embedded in the package; the default task."""

from importlib.resources import files

import numpy as np

from hiso_jax.checks import ParameterError
from hiso_jax.models import Model, cnn, mlp
from hiso_jax.tasks.classification import Classification

TEST_EXAMPLES = 360
TARGET = 0.90


def digits_network(model: str | None = None) -> Model:
    """The network of ``digits(model)``; None means its default.

    Raises:
      ValueError: ``model`` is unknown.
    """
    if model in (None, "mlp"):
        return mlp(side=8, hidden=32)
    if model == "cnn":
        return cnn(side=8, kernel=3, features=(8, 16))
    raise ParameterError("model", f"must be mlp or cnn for digits, got {model}")


def digits(model: str = "mlp") -> Classification:
    """1,437 training and 360 test images of 8×8 pixels in 10 classes (see ``data/README.md``).

    Args:
      model: ``"mlp"`` (one hidden layer of 32, 2,410 parameters) or ``"cnn"`` (3×3×8 and 3×3×16 convolutions,
        1,898 parameters).

    Raises:
      ValueError: ``model`` is unknown.
    """
    network = digits_network(model)
    with files("hiso_jax.tasks").joinpath("data/digits.npz").open("rb") as file, np.load(file) as arrays:
        images, labels = arrays["image"], arrays["label"]
    inputs = (images.astype(np.float32) / 16 - 0.5)[..., None]
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = order[:TEST_EXAMPLES], order[TEST_EXAMPLES:]
    return Classification(
        model_init=network.init,
        model_apply=network.apply,
        perturbed_as=network.perturbed_as,
        train={"input": inputs[train], "label": labels[train]},
        test={"input": inputs[test], "label": labels[test]},
        name="digits",
        target=TARGET,
    )
