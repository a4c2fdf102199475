"""HiSo as an optimizer of a flax.nnx module, in bfloat16, and with the batch split over eight devices.

python examples/optimizer_nnx.py

On a machine without accelerators it makes eight virtual devices.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from optimizer import IMAGES, LABELS, OPTIMIZER, STEPS, batch_at, loss_fn

from hiso_jax import zo


def with_nnx() -> None:
    """A module of flax.nnx: its parameters are one pytree, the rest is closed over."""
    graph, params = nnx.split(nnx.Linear(64, 10, rngs=nnx.Rngs(0)), nnx.Param)

    def loss_of(params: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
        logits = nnx.merge(graph, params)(batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    step, state = jax.jit(zo.step(loss_of, OPTIMIZER, num_perturbations=10)), OPTIMIZER.init(params)
    for key in jax.random.split(jax.random.key(1), STEPS):
        params, state, _ = step(params, state, batch_at(key), key)
    print(f"flax.nnx: accuracy {(nnx.merge(graph, params)(IMAGES).argmax(-1) == LABELS).mean():.3f}")


def in_bfloat16_on_eight_devices() -> None:
    """Updates are rounded stochastically, the curvature stays in float32; the compiler inserts sums over devices."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    # μ moves a parameter in bfloat16 only if it is not far below it.
    step = jax.jit(zo.step(loss_fn, OPTIMIZER, num_perturbations=10, mu=1e-2))
    params = jax.device_put({"w": jnp.zeros((64, 10), jnp.bfloat16), "b": jnp.zeros(10, jnp.bfloat16)}, whole)
    state, loss = jax.device_put(OPTIMIZER.init(params), whole), jnp.inf * jnp.ones(())
    for key in jax.random.split(jax.random.key(3), STEPS):
        params, state, loss = step(params, state, jax.device_put(batch_at(key), split), key)
        # Virtual devices share the cores: sums of steps that wait for one another could starve.
        loss.block_until_ready()
    print(f"{jax.device_count()} devices: loss {loss:.3f}, parameters {params['w'].dtype}")


if __name__ == "__main__":
    with_nnx()
    in_bfloat16_on_eight_devices()
