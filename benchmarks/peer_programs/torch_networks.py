"""The networks of the comparison in PyTorch, and its data; shared by the programs of Flower, pfl and BlazeFL."""

import json
import sys

import numpy as np
import torch
from torch import nn

SETTING = json.loads(sys.argv[1])


def network() -> nn.Module:
    """The CNN of DeComFL for MNIST (28,938 parameters), or pfl's ``simple_cnn`` for CIFAR-10 without its dropout."""
    if SETTING["network"] == "mnist":
        return nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(7 * 7 * 32, 10),
        )  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(14 * 14 * 64, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def clients_data() -> tuple[torch.Tensor, torch.Tensor]:
    """Images [clients, examples, C, H, W] and labels [clients, examples]."""
    with np.load(SETTING["data"]) as data:
        images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"]).long()
    images = images.permute(0, 3, 1, 2).contiguous()
    shape = (SETTING["clients"], SETTING["examples"])
    return images.reshape(*shape, *images.shape[1:]), labels.reshape(shape)


def print_round(number: int) -> None:
    """Tell the script that a round is done; it reads the clock."""
    print(f"ROUND {number}", flush=True)
