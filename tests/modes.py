"""One small simulation, ``zo.step`` and every sampler, for JAX's strict and debugging modes: ``python -m tests.modes``.

The modes are set by the environment of the process (``JAX_DEBUG_NANS=1`` and the like), as careful users set them.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hiso_jax
from hiso_jax import algorithms, fed, tasks, zo

METHODS = {"hiso": {}, "mosaic": {"scalar_bits": 2}, "hizoo": {"guard": True}, "sign": {}, "fed_avg": {}}
# A program that is run operation by operation takes half a minute for each method.
if jax.config.jax_disable_jit:
    METHODS = {"hiso": {}}
SAMPLERS = ("gaussian", "rademacher", "sphere", "binomial", "hadamard", "low_rank")


def toy() -> tasks.Classification:
    """A linear classifier of 40 random points."""
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    data = {"input": x, "label": (x[:, 0] > 0).astype(np.int32)}
    return tasks.Classification(
        lambda key: {"w": 0.1 * jax.random.normal(key, (4, 2), jnp.float32)}, lambda p, v: v @ p["w"], data, data
    )


def simulate(name: str) -> None:
    """Four rounds of a method; its replay has the same bits."""
    local = {"local_steps": 2, "local_learning_rate": 0.01} if name == "hiso" else {}
    config = fed.SimulationConfig(rounds=4, cohort=4, eval_every=2, batch_size=4, **local)
    algorithm = algorithms.load(name).build(0.02, METHODS[name])
    participation = fed.Participation(
        availability=fed.Bernoulli(0.9),
        dropout=0.1,
        fleet=fed.Fleet(fed.LogNormal(0.1, 0.1), fed.LogNormal(1e5, 0.1), fed.LogNormal(1e5, 0.1)),
    )
    result = fed.Simulation(toy(), algorithm, fed.iid(40, 8), config, participation=participation).run()
    assert np.isfinite(result.metrics[-1].metrics["loss"]), result.metrics
    if algorithm.has_scalars:
        params, _ = fed.replay(result.initial_params, algorithm, result.records)
        jax.tree.map(np.testing.assert_array_equal, params, result.params)


def step(sampler: str) -> None:
    """Three steps without a federation, with weight decay and SGD behind the head."""
    tx = optax.chain(hiso_jax.scale_by_hiso(sampler=sampler), optax.add_decayed_weights(1e-4), optax.sgd(0.05))
    params = {"w": jnp.ones((4, 6), jnp.float32), "b": jnp.zeros(3, jnp.float32)}
    run, state = jax.jit(zo.step(lambda p, batch: sum(jnp.square(x).sum() for x in p.values()), tx)), tx.init(params)
    first = None
    for number in range(3):
        params, state, loss = run(params, state, None, jax.random.fold_in(jax.random.key(0), number))
        first = loss if first is None else first
    assert np.isfinite(float(loss)), loss


def main() -> None:
    """Run every part by itself, and print the parts that fail."""
    parts = {f"simulation of {name}": lambda name=name: simulate(name) for name in METHODS}
    parts |= {f"zo.step with {sampler}": lambda sampler=sampler: step(sampler) for sampler in SAMPLERS}
    failed = 0
    for name, part in parts.items():
        try:
            part()
            print(f"{name}: runs")
        except Exception as error:
            failed += 1
            print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:400]}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
