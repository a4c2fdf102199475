"""A small real problem for tests of the federation: digits among a few clients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hiso_jax
from hiso_jax import fed, tasks


@functools.cache
def digits_task():
    return tasks.digits()


@functools.cache
def linear_task():
    """Softmax regression on the digits: two leaves, so that programs compile soon."""
    digits = digits_task()

    def init(key):
        return {"bias": jnp.zeros(10), "weight": 0.1 * jax.random.normal(key, (64, 10))}

    def apply(params, images):
        return images.reshape(len(images), -1) @ params["weight"] + params["bias"]

    return tasks.Classification(init, apply, digits.train, digits.test, name="linear")


@functools.cache
def double_task():
    """The linear task in double precision."""
    base = linear_task()

    def init(key):
        return jax.tree.map(lambda x: x.astype(jnp.float64), base.model_init(key))

    train = {"input": base.train["input"].astype(np.float64), "label": base.train["label"]}
    return dataclasses.replace(base, model_init=init, train=train)


@functools.cache
def digits_population(clients=12):
    return fed.dirichlet(digits_task().train["label"], clients, alpha=0.5)


def optimizers(rate=0.02):
    """Server optimizers that stress the arithmetic in different ways."""
    schedule = optax.cosine_decay_schedule(rate, 20)
    return {
        "hiso": hiso_jax.hiso(rate),
        "hiso-all": hiso_jax.hiso(schedule, curvature_update="all"),
        "decomfl": hiso_jax.decomfl(schedule),
        "momentum": optax.chain(
            hiso_jax.scale_by_hiso(),
            optax.clip_by_global_norm(10.0),
            optax.add_decayed_weights(5e-4),
            optax.trace(0.9),
            optax.scale_by_learning_rate(rate / 10),
        ),
        "adam": optax.chain(
            hiso_jax.scale_by_zo(sampler=hiso_jax.rademacher),
            optax.scale_by_adam(),
            optax.scale_by_learning_rate(schedule),
        ),
    }


def assert_trees_identical(one, other):
    """Check that two trees have the same structure, the same dtypes and the same bits (NaN included)."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        where = jax.tree_util.keystr(path)
        assert a.dtype == b.dtype, where
        assert a.shape == b.shape, where
        differing = int((a.reshape(-1).view(np.uint8) != b.reshape(-1).view(np.uint8)).sum())
        assert differing == 0, f"{where}: {differing} bytes differ"
