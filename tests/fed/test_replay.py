"""Replaying the recorded scalars rebuilds the run bit for bit, however either was dispatched."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

import hiso_jax
from hiso_jax import algorithms, fed, zo
from tests.fed.problems import (
    assert_trees_identical,
    digits_population,
    digits_task,
    linear_task,
    optimizers,
)
from tests.marks import thorough

ROUNDS = 24


def run(tx, *, steps, perturbations, per_dispatch, task=None):
    config = fed.SimulationConfig(
        rounds=ROUNDS,
        cohort=4,
        local_steps=steps,
        perturbations=perturbations,
        batch_size=8,
        eval_every=ROUNDS,
        rounds_per_dispatch=per_dispatch,
        local_learning_rate=0.01,
    )
    return fed.Simulation(task or linear_task(), tx, digits_population(), config).run()


def check(tx, *, steps, **settings):
    result = run(tx, steps=steps, **settings)
    assert result.rounds == ROUNDS
    # The replay has fewer rounds than a block, several blocks with a padded last one, or one round at a time.
    for replay_dispatch in (None, 7, 1) if steps == 1 else (None, 1):
        rebuilt = fed.replay(result.initial_params, tx, result.records, rounds_per_dispatch=replay_dispatch)
        assert_trees_identical((result.params, result.state), rebuilt)


slow = pytest.mark.slow
ALL = [(steps, perturbations) for steps in (1, 3) for perturbations in (1, 2, 5)]


@pytest.mark.parametrize(
    ("steps", "perturbations"),
    [case if case == (1, 1) else pytest.param(*case, marks=slow) for case in ALL],
)
def test_replay_of_a_scanned_run_is_exact(steps, perturbations):
    check(optimizers()["hiso"], steps=steps, perturbations=perturbations, per_dispatch=None)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("steps", "perturbations"),
    [case if case == (1, 1) else pytest.param(*case, marks=slow) for case in ALL],
)
def test_replay_of_a_run_dispatched_round_by_round_is_exact(steps, perturbations):
    check(optimizers()["hiso"], steps=steps, perturbations=perturbations, per_dispatch=1)


# Without the pins of zo and the conditional around the server's update, momentum at P = 1 would differ.
@pytest.mark.parametrize(
    ("name", "steps", "perturbations"),
    [
        ("hiso-all", 3, 5),
        thorough("momentum", 1, 1),
        pytest.param("decomfl", 1, 1, marks=slow),
        pytest.param("adam", 3, 2, marks=slow),
    ],
)
@pytest.mark.parametrize("per_dispatch", [None, pytest.param(1, marks=slow)])
def test_replay_is_exact_through_any_chain(name, steps, perturbations, per_dispatch):
    check(optimizers()[name], steps=steps, perturbations=perturbations, per_dispatch=per_dispatch)


@pytest.mark.thorough
@pytest.mark.parametrize("per_dispatch", [None, pytest.param(1, marks=slow)])
def test_replay_is_exact_for_a_network(per_dispatch):
    tx = optimizers()["hiso"]
    result = run(tx, steps=1, perturbations=1, per_dispatch=per_dispatch, task=digits_task())
    assert_trees_identical((result.params, result.state), fed.replay(result.initial_params, tx, result.records))


@pytest.mark.thorough
def test_a_replay_in_two_parts_is_one():
    tx = optimizers()["momentum"]
    result = run(tx, steps=1, perturbations=2, per_dispatch=None)
    updates = result.records.updates
    params, state = fed.replay(result.initial_params, tx, updates.between(0, 10))
    whole = fed.replay(params, tx, updates.between(10), state=state)
    assert_trees_identical((result.params, result.state), whole)
    with pytest.raises(ValueError, match="rounds must be within 0 to 24"):
        updates.between(0, 25)


@pytest.mark.thorough
def test_rademacher_directions_with_decomfl_replay_alike_anywhere():
    """NumPy stands for another backend: it has none of XLA's fusions and contractions."""
    rate, tx = np.float32(0.02), hiso_jax.decomfl(0.02, sampler=zo.rademacher)
    result = run(tx, steps=3, perturbations=5, per_dispatch=None)
    ours = {name: np.array(leaf) for name, leaf in result.initial_params.items()}
    draw = jax.jit(lambda key: zo.direction(key, result.initial_params, sampler=zo.rademacher))
    for number, aggregate in zip(result.records.round, result.records.aggregate, strict=True):
        key = fed.round_key(result.records.seed_key, number)
        steps = []
        for k, scalars in enumerate(aggregate):
            total = {name: np.zeros_like(leaf) for name, leaf in ours.items()}
            for p, scalar in enumerate(scalars):
                signs = draw(zo.perturbation_key(key, k, p))
                for name in ours:
                    weight = scalar * np.float32(1 / len(scalars))
                    total[name] = total[name] + weight * np.asarray(signs[name])
            steps.append(total)
        for name in ours:
            delta = steps[0][name]
            for step in steps[1:]:
                delta = delta + step[name]
            ours[name] = ours[name] + -rate * delta
    for name in ours:
        np.testing.assert_array_equal(ours[name], np.asarray(result.params[name]))


@pytest.mark.thorough
def test_an_optimizer_that_reads_the_loss_is_replayed_from_ledger_and_delta(tmp_path):
    """A broadcast loss costs four bytes a round; a private run broadcasts none."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, atol=1e-12, rtol=0.0)
    tx = optax.chain(optax.zero_nans(), hiso_jax.decomfl(0.05), plateau)
    config = fed.SimulationConfig(rounds=12, cohort=4, eval_every=6, perturbations=2, batch_size=8)

    def run(tx, storage=None):
        return fed.Simulation(linear_task(), tx, digits_population(), config, storage=storage).run()

    result = run(tx, fed.Storage(tmp_path / "run", snapshot_every=0))
    plain = run(hiso_jax.decomfl(0.05))
    assert float(optax.tree_utils.tree_get(result.state, "scale")) < 1
    missed = (result.traffic["bytes_down"] - plain.traffic["bytes_down"]) / 4
    assert missed > 0
    assert missed == round(missed)
    params, state = fed.replay(result.initial_params, tx, result.records)
    assert_trees_identical((params, state), (result.params, result.state))
    fed.save_delta(fed.delta_of(fed.load(tmp_path / "run")), tmp_path / "delta.safetensors")
    delta = fed.load_delta(tmp_path / "delta.safetensors")
    assert fed.fingerprint(fed.apply_delta(delta, result.initial_params, tx)) == fed.fingerprint(result.params)
    with pytest.raises(ValueError, match="the optimizer asks for value, the loss, which these rounds do not compute"):
        fed.replay(result.initial_params, tx, delta.updates._replace(loss=None))
    private = dataclasses.replace(algorithms.load("decomfl+private_mean").build(0.1, {}), tx=tx)
    with pytest.raises(ValueError, match="tx must not read the loss in a private run"):
        fed.Simulation(linear_task(), private, digits_population(), config)


def test_a_second_replay_with_the_same_algorithm_compiles_nothing():
    method = hiso_jax.mosaic(0.1)
    config = fed.SimulationConfig(rounds=2, cohort=2, batch_size=4, perturbations=8, eval_every=2)
    result = fed.Simulation(linear_task(), method, digits_population(), config).run()
    fed.replay(result.initial_params, method, result.records)
    with pytest.MonkeyPatch.context() as patch:
        lowered = []
        patch.setattr("jax._src.interpreters.mlir.lower_jaxpr_to_module", lambda *a, **k: lowered.append(a))
        fed.replay(result.initial_params, method, result.records)
    assert not lowered
