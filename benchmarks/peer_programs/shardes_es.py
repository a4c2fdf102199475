"""An evolution strategy in shardes: full-rank directions made again from seeds, in mirrored pairs."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from shardes import sharding
from shardes.core import ShardedES
from shardes.nn import dense
from shardes.strategies.mirrored import Mirrored
from shardes.strategies.seed_regenerated import SeedRegenerated

SETTING = json.loads(sys.argv[1])
with np.load(SETTING["data"]) as data:
    images, labels = data["images"].reshape(len(data["images"]), -1), data["labels"]
sizes = (images.shape[1], 256, 10)
keys = jax.random.split(jax.random.key(0), 2)
params = {
    f"w{layer}": jax.random.normal(key, (sizes[layer + 1], sizes[layer])) / sizes[layer] ** 0.5
    for layer, key in enumerate(keys)
}


def loss(params, batch):
    logits = dense(jnp.tanh(dense(batch[0], params["w0"])), params["w1"])
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1][:, None], 1).mean()


es = ShardedES(
    strategy=Mirrored(SeedRegenerated()), n=SETTING["population"], sigma=1e-2, lr=SETTING["rate"],
    mesh=sharding.make_mesh(),
)  # fmt: skip
state = es.init(jax.random.key(1), params)


@jax.jit
def generation(state, batch):
    perturbation, state = es.ask(state)
    return es.tell(state, perturbation, es.apply(loss, state, perturbation)(batch))


batch = jnp.asarray(images[: SETTING["batch"]]), jnp.asarray(labels[: SETTING["batch"]])
for number in range(SETTING["rounds"]):
    state = jax.block_until_ready(generation(state, batch))
    print(f"ROUND {number + 1}", flush=True)
