"""HiSo as an optimizer of a plain pytree: a chain of optax, a scan, a checkpoint of orbax. Forward passes only."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import hiso_jax
from hiso_jax import tasks, zo

STEPS = 400
IMAGES = jnp.asarray(tasks.digits().train["input"]).reshape(-1, 64)
LABELS = jnp.asarray(tasks.digits().train["label"])
# HiSo's head first, then any transformation of optax: clipping, momentum, a schedule.
OPTIMIZER = optax.chain(
    hiso_jax.scale_by_hiso(),
    optax.clip_by_global_norm(5.0),
    optax.trace(0.5),
    optax.scale_by_learning_rate(optax.cosine_decay_schedule(0.05, STEPS)),
)


def batch_at(key: jax.Array) -> dict[str, jax.Array]:
    """A random batch."""
    chosen = jax.random.randint(key, (128,), 0, len(LABELS))
    return {"x": IMAGES[chosen], "y": LABELS[chosen]}


def loss_fn(params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
    """The loss of a linear classifier, in float32 whatever the parameters are."""
    logits = (batch["x"].astype(params["w"].dtype) @ params["w"] + params["b"]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def main() -> None:
    """All steps as one program; then a checkpoint, from which training goes on to the same bits."""
    step = jax.jit(zo.step(loss_fn, OPTIMIZER, num_perturbations=10))

    def one(carry: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
        params, state, loss = step(*carry, batch_at(key), key)
        return (params, state), loss

    params = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
    keys = jax.random.split(jax.random.key(0), STEPS)
    reached, losses = jax.jit(lambda carry: jax.lax.scan(one, carry, keys))((params, OPTIMIZER.init(params)))
    print(f"scan: loss {losses[0]:.3f} → {losses[-20:].mean():.3f}")
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "step", reached)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(Path(folder) / "step", jax.tree.map(ocp.utils.to_shape_dtype_struct, reached))
    ours, theirs = (step(*each, batch_at(keys[0]), keys[0]) for each in (reached, restored))
    same = jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), ours, theirs))
    print(f"orbax: the next step has the same bits: {same}")


if __name__ == "__main__":
    main()
