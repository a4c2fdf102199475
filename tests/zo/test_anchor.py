"""Anchored weight decay: the formula, its bits in runs and replays, and its option of every method."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hiso_jax
from hiso_jax import Experiment, algorithms, fed, zo
from hiso_jax.checks import ParameterError
from tests.fed.problems import assert_trees_identical, digits_population, linear_task
from tests.marks import thorough


def test_an_update_goes_back_by_the_formula(x64):
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2)}
    plain = hiso_jax.decomfl(0.1)
    tx = optax.chain(plain, zo.anchored_decay(0.25))
    state, bare = tx.init(params), plain.init(params)
    now = jax.tree.map(lambda x: 3 * x + 1, params)
    scalars, key = jnp.array([[0.5, -1.0]]), jax.random.key(3)
    found, state = tx.update(scalars, state, now, key=key)
    updates, _ = plain.update(scalars, bare, now, key=key)
    expected = jax.tree.map(lambda u, x, start: u - 0.25 * (x - start), updates, now, params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    # At the start itself it changes nothing.
    both = (tx, state), (plain, bare)
    assert_trees_identical(*(each.update(scalars, own, params, key=key)[0] for each, own in both))


def run(algorithm, **given):
    config = fed.SimulationConfig(rounds=8, cohort=2, batch_size=4, eval_every=8, perturbations=3)
    return fed.Simulation(linear_task(), algorithm, digits_population(), config, **given).run()


def far(result):
    pairs = zip(jax.tree.leaves(result.params), jax.tree.leaves(result.initial_params), strict=True)
    return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs)))


@pytest.mark.parametrize("name", ["decomfl", thorough("hiso"), thorough("mosaic"), thorough("zo_adam")])
def test_a_run_stays_nearer_its_start_and_replays_to_the_bit(name, tmp_path):
    method = algorithms.load(name)
    plain, anchored = (method.build(0.05, {"anchor_decay": rate}) for rate in (0.0, 0.2))
    free, held = run(plain), run(anchored, storage=tmp_path / "run")
    assert far(held) < 0.8 * far(free)
    replayed, _ = fed.replay(held.initial_params, anchored, fed.load(tmp_path / "run").records)
    assert_trees_identical(replayed, held.params)
    # With a share of 1 a round begins at the initial parameters, moved by the last update alone.
    assert far(run(method.build(0.05, {"anchor_decay": 1.0}))) < far(held)


@pytest.mark.thorough
def test_a_run_goes_on_towards_the_same_start(tmp_path):
    method = algorithms.load("decomfl").build(0.05, {"anchor_decay": 0.2})
    stop = fed.Callback(lambda session, _: session.stop() if session.round >= 3 else None)
    config = fed.SimulationConfig(
        rounds=8, cohort=2, batch_size=4, eval_every=8, perturbations=3, rounds_per_dispatch=1
    )
    given = linear_task(), method, digits_population(), config
    fed.Simulation(*given, storage=tmp_path / "run", callbacks=[stop]).run()
    again = fed.Simulation(*given, storage=fed.Storage(tmp_path / "run", resume=True)).run()
    assert_trees_identical(again.params, run(method).params)


def test_it_is_an_option_of_every_method_that_sends_scalars():
    assert all(
        "anchor_decay" in method.options for method in map(algorithms.load, algorithms.NAMES) if method.has_scalars
    )
    experiment = Experiment(task="digits", algorithm="sign", anchor_decay=0.1, rounds=1)
    assert experiment.about["anchor_decay"] == 0.1
    with pytest.raises(ParameterError, match="anchor_decay must be"):
        Experiment(task="digits", algorithm="sign", anchor_decay=1.5, rounds=1)
    with pytest.raises(ParameterError, match="anchor_decay"):
        Experiment(task="digits", algorithm="fed_avg", anchor_decay=0.1, rounds=1)
    tx, params = zo.anchored_decay(0.1), {"w": jnp.ones(2)}
    state = tx.init(params)
    with pytest.raises(ParameterError, match="params must be given to anchored_decay"):
        tx.update(params, state)
