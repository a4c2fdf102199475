"""FedAvg, projections, mosaic and DeComFL here."""

import json
import sys

import numpy as np
from flax import nnx

import hiso_jax
from hiso_jax import fed, models, tasks

SETTING = json.loads(sys.argv[1])


class SimpleCNN(nnx.Module):
    """The ``simple_cnn`` of pfl for CIFAR-10, without its dropout."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(3, 32, (3, 3), padding="VALID", conv_general_dilated=models.convolution, rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), padding="VALID", conv_general_dilated=models.convolution, rngs=rngs)
        self.hidden, self.output = nnx.Linear(14 * 14 * 64, 128, rngs=rngs), nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images):
        x = models.max_pool(nnx.relu(self.conv2(nnx.relu(self.conv1(images)))), (2, 2))
        return self.output(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))


METHODS = {
    "fed_avg": hiso_jax.fed_avg,
    "local_mosaic": hiso_jax.local_mosaic,
    "mosaic": hiso_jax.mosaic,
    "decomfl": hiso_jax.decomfl,
}
with np.load(SETTING["data"]) as data:
    train = {"input": data["images"], "label": data["labels"]}
mnist = SETTING["network"] == "mnist"
model = models.cnn(side=28, kernel=5, features=(16, 32)) if mnist else models.functional(SimpleCNN)
task = tasks.Classification(model.init, model.apply, train, {name: array[:100] for name, array in train.items()})
examples = len(train["label"])
config = fed.SimulationConfig(
    rounds=SETTING["rounds"],
    cohort=SETTING["cohort"],
    batch_size=SETTING["batch"],
    local_steps=SETTING["local_steps"],
    perturbations=SETTING.get("perturbations"),
    local_learning_rate=SETTING["rate"],
    eval_every=10**9,
)
hiso_jax.Simulation(
    task,
    METHODS[SETTING["method"]](SETTING["rate"]),
    fed.Population(np.arange(examples), np.arange(0, examples + 1, SETTING["examples"])),
    config,
    callbacks=[fed.Callback(lambda session, evaluation: print(f"ROUND {session.round}", flush=True))],
).run()
