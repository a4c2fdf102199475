"""The same evolution strategy here: central differences along directions made again from a seed."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hiso_jax import zo

SETTING = json.loads(sys.argv[1])
with np.load(SETTING["data"]) as data:
    images, labels = data["images"].reshape(len(data["images"]), -1), data["labels"]
sizes = (images.shape[1], 256, 10)
keys = jax.random.split(jax.random.key(0), 2)
params = {
    f"w{layer}": jax.random.normal(key, (sizes[layer], sizes[layer + 1])) / sizes[layer] ** 0.5
    for layer, key in enumerate(keys)
}


def loss(params, batch):
    logits = jnp.tanh(batch[0] @ params["w0"]) @ params["w1"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


tx = optax.chain(zo.scale_by_zo(), optax.scale_by_learning_rate(SETTING["rate"]))
step = jax.jit(zo.step(loss, tx, num_perturbations=SETTING["population"] // 2, mu=1e-2, difference="central"))
state, key = tx.init(params), jax.random.key(1)
batch = jnp.asarray(images[: SETTING["batch"]]), jnp.asarray(labels[: SETTING["batch"]])
for number in range(SETTING["rounds"]):
    params, state, value = jax.block_until_ready(step(params, state, batch, jax.random.fold_in(key, number)))
    print(f"ROUND {number + 1}", flush=True)
