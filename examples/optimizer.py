"""HiSo as an optimizer, with forward passes only: pytrees, flax.nnx, schedules, scan, bfloat16, eight devices, orbax.

    python examples/optimizer.py

On a machine without accelerators it makes eight virtual devices. Every part trains on the embedded digits.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

import hiso_jax
from hiso_jax import tasks, zo

STEPS, BATCH = 400, 128
DIGITS = tasks.digits()
IMAGES = jnp.asarray(DIGITS.train["input"]).reshape(-1, 64)
LABELS = jnp.asarray(DIGITS.train["label"])
Params = dict[str, jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean loss of a batch, in float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


def batch_at(key: jax.Array) -> dict[str, jax.Array]:
    """A random batch."""
    chosen = jax.random.randint(key, (BATCH,), 0, len(LABELS))
    return {"x": IMAGES[chosen], "y": LABELS[chosen]}


def first_params(key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """A linear classifier as a plain pytree."""
    return {"w": 0.1 * jax.random.normal(key, (64, 10), dtype), "b": jnp.zeros(10, dtype)}


def loss_fn(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
    """The loss of the linear classifier."""
    return cross_entropy(batch["x"].astype(params["w"].dtype) @ params["w"] + params["b"], batch["y"])


def optimizer() -> optax.GradientTransformation:
    """HiSo's head first, then any transformation of optax: momentum, clipping, a schedule."""
    schedule = optax.cosine_decay_schedule(0.05, STEPS)
    return optax.chain(
        hiso_jax.scale_by_hiso(),
        optax.clip_by_global_norm(5.0),
        optax.trace(0.5),
        optax.scale_by_learning_rate(schedule),
    )


def with_scan() -> tuple[Params, optax.OptState]:
    """All steps as one program: a scan over keys."""
    tx, key = optimizer(), jax.random.key(0)
    step = zo.step(loss_fn, tx, num_perturbations=10)

    def one(carry: tuple[Params, optax.OptState], key: jax.Array) -> tuple[Any, jax.Array]:
        params, state, loss = step(carry[0], carry[1], batch_at(key), key)
        return (params, state), loss

    params = first_params(key)
    carry, losses = jax.jit(lambda carry, keys: jax.lax.scan(one, carry, keys))(
        (params, tx.init(params)), jax.random.split(key, STEPS)
    )
    print(f"scan: loss {losses[0]:.3f} → {losses[-20:].mean():.3f}")
    return carry


def with_nnx() -> None:
    """A module of flax.nnx: its parameters are one pytree, the rest is closed over."""
    graph, params = nnx.split(nnx.Linear(64, 10, rngs=nnx.Rngs(0)), nnx.Param)

    def loss_of(params: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
        return cross_entropy(nnx.merge(graph, params)(batch["x"]), batch["y"])

    tx = optimizer()
    step, state = jax.jit(zo.step(loss_of, tx, num_perturbations=10)), tx.init(params)
    for key in jax.random.split(jax.random.key(1), STEPS):
        params, state, _ = step(params, state, batch_at(key), key)
    model = nnx.merge(graph, params)
    accuracy = (model(IMAGES).argmax(-1) == LABELS).mean()
    print(f"flax.nnx: accuracy {accuracy:.3f}")


def in_bfloat16() -> None:
    """Parameters and model in bfloat16: updates are rounded stochastically, the curvature stays in float32."""
    tx = optimizer()
    # μ moves a parameter in bfloat16 only if it is not far below it.
    step, params = (
        jax.jit(zo.step(loss_fn, tx, num_perturbations=10, mu=1e-2)),
        first_params(jax.random.key(0), jnp.bfloat16),
    )
    state = tx.init(params)
    for key in jax.random.split(jax.random.key(2), STEPS):
        params, state, loss = step(params, state, batch_at(key), key)
    print(f"bfloat16: loss {loss:.3f}, parameters {params['w'].dtype}")


def on_eight_devices() -> None:
    """The batch split over the devices, the parameters on each: the compiler inserts the sums."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    tx = optimizer()
    step = jax.jit(zo.step(loss_fn, tx, num_perturbations=10))
    params = jax.device_put(first_params(jax.random.key(0)), whole)
    state = jax.device_put(tx.init(params), whole)
    for key in jax.random.split(jax.random.key(3), STEPS):
        params, state, loss = step(params, state, jax.device_put(batch_at(key), split), key)
    print(f"{jax.device_count()} devices: loss {loss:.3f}")


def with_orbax(params: Params, state: optax.OptState) -> None:
    """Parameters and optimizer state in a checkpoint, and training that goes on to the same bits."""
    tx = optimizer()
    step, key = jax.jit(zo.step(loss_fn, tx, num_perturbations=10)), jax.random.key(4)
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "step", (params, state))
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, state))
        restored = checkpointer.restore(Path(folder) / "step", like)
    ours, theirs = step(params, state, batch_at(key), key), step(*restored, batch_at(key), key)
    same = jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), ours, theirs))
    print(f"orbax: the next step after a restore has the same bits: {same}")


if __name__ == "__main__":
    reached = with_scan()
    with_nnx()
    in_bfloat16()
    on_eight_devices()
    with_orbax(*reached)
