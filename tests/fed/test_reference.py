"""The published implementation's trajectories, reproduced through the public API in float64."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hiso_jax
from hiso_jax import fed, zo

REFERENCE = Path(__file__).parent.parent / "reference"
TOLERANCE = 1e-9


def injected(table_keys, table_values):
    """A sampler that looks up the reference's perturbation by its key."""

    def sampler(key, shape, dtype):
        match = (table_keys == jax.random.key_data(key)).all(-1)
        return table_values[jnp.argmax(match)].reshape(shape).astype(dtype)

    return sampler


@pytest.mark.parametrize("name", ["hiso_k1", "hiso_k3", "decomfl_forward", "decomfl_central"])
def test_trajectory_of_the_published_implementation(name, x64):
    ref = json.loads((REFERENCE / f"{name}.json").read_text())
    steps, perturbations, rounds = ref["local_steps"], ref["perturbations"], ref["rounds"]
    matrices, vectors = jnp.array(ref["A"]), jnp.array(ref["b"])
    seed_key = jax.random.key(3)
    keys = jnp.stack(
        [
            jax.random.key_data(jax.random.fold_in(zo.perturbation_key(fed.round_key(seed_key, r), k, p), 0))
            for r in range(rounds)
            for k in range(steps)
            for p in range(perturbations)
        ]
    )
    sampler = injected(keys, jnp.array(ref["u"]).reshape(-1, ref["dim"]))

    def loss(x, client):
        a, b = matrices[client], vectors[client]
        return 0.5 * jnp.einsum("i,bij,j->b", x, a, x) - b @ x + 0.1 * jnp.sin(x).sum()

    rate = ref["learning_rate"]
    if ref["algorithm"] == "hiso":
        update = ref["curvature_update"]
        tx = hiso_jax.hiso(rate, decay=ref["curvature_decay"], eps=0.0, curvature_update=update, sampler=sampler)
    else:
        tx = hiso_jax.decomfl(rate, sampler=sampler)
    run = jax.jit(
        hiso_jax.make_round(
            loss,
            tx,
            local_steps=steps,
            num_perturbations=perturbations,
            mu=ref["mu"],
            difference=ref["method"],
            local_learning_rate=rate,
        )
    )
    params = jnp.array(ref["x0"])
    state = tx.init(params)
    expected = ref["expected"]
    for r in range(rounds):
        cohort = jnp.array(ref["cohorts"][r])
        batches = jnp.broadcast_to(cohort[:, None, None], (len(cohort), steps, 1))
        params, state, record = run(params, state, batches, jnp.ones(len(cohort), bool), fed.round_key(seed_key, r))
        pairs = {
            "client_scalars": record.scalars,
            "global_scalars": record.aggregate,
            "params": params,
        }
        curvature = optax.tree_utils.tree_get(state, "curvature")
        if ref["algorithm"] == "hiso":
            pairs["curvature"] = curvature
        else:
            assert curvature is None
            np.testing.assert_array_equal(expected["curvature"][r], 1.0)
        for what, value in pairs.items():
            assert value.dtype == jnp.float64
            difference = np.abs(np.asarray(value) - np.array(expected[what][r])).max()
            assert difference <= TOLERANCE, f"{what} of round {r} differs by {difference}"
