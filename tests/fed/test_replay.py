"""Replaying the recorded scalars rebuilds the run bit for bit, however either was dispatched."""

import numpy as np
import pytest

from hiso_jax import fed
from tests.fed.problems import (
    assert_trees_identical,
    digits_population,
    digits_task,
    linear_task,
    optimizers,
)

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


def check(tx, *, per_dispatch, **settings):
    result = run(tx, per_dispatch=per_dispatch, **settings)
    assert result.rounds == ROUNDS
    for replay_dispatch in (None, 1):
        rebuilt = fed.replay(result.initial_params, tx, result.records, rounds_per_dispatch=replay_dispatch)
        assert_trees_identical((result.params, result.state), rebuilt)


@pytest.mark.parametrize("perturbations", [1, 2, 5])
@pytest.mark.parametrize("steps", [1, 3])
def test_replay_of_a_scanned_run_is_exact(steps, perturbations):
    check(optimizers()["hiso"], steps=steps, perturbations=perturbations, per_dispatch=None)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("steps", "perturbations"),
    [(1, 1), *(pytest.param(*case, marks=slow) for case in [(1, 2), (1, 5), (3, 1), (3, 2), (3, 5)])],
)
def test_replay_of_a_run_dispatched_round_by_round_is_exact(steps, perturbations):
    check(optimizers()["hiso"], steps=steps, perturbations=perturbations, per_dispatch=1)


# Without the pins of zo, and the conditional around the server's update, momentum at P = 1 parts.
@pytest.mark.parametrize(
    ("name", "steps", "perturbations"), [("hiso-all", 3, 5), ("decomfl", 1, 1), ("momentum", 1, 1), ("adam", 3, 2)]
)
@pytest.mark.parametrize("per_dispatch", [None, pytest.param(1, marks=slow)])
def test_replay_is_exact_through_any_chain(name, steps, perturbations, per_dispatch):
    check(optimizers()[name], steps=steps, perturbations=perturbations, per_dispatch=per_dispatch)


@pytest.mark.parametrize("per_dispatch", [None, 1])
def test_replay_is_exact_for_a_network(per_dispatch):
    tx = optimizers()["hiso"]
    result = run(tx, steps=1, perturbations=1, per_dispatch=per_dispatch, task=digits_task())
    assert_trees_identical((result.params, result.state), fed.replay(result.initial_params, tx, result.records))


def test_saved_ledger_replays_the_run(tmp_path):
    tx = optimizers()["hiso"]
    result = run(tx, steps=1, perturbations=2, per_dispatch=None)
    fed.save(result.records, tmp_path / "ledger.npz", {"rounds": ROUNDS})
    records, config = fed.load(tmp_path / "ledger.npz")
    assert config == {"rounds": ROUNDS}
    assert_trees_identical((result.params, result.state), fed.replay(result.initial_params, tx, records))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"not a ledger"])
def test_a_file_that_is_no_ledger_is_refused(tmp_path, content):
    path = tmp_path / "ledger.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a ledger that can be read here"):
        fed.load(path)


def test_another_format_is_named(tmp_path):
    np.savez(tmp_path / "ledger.npz", format=np.int32(1))
    with pytest.raises(ValueError, match="ledger format 1; this version reads 2"):
        fed.load(tmp_path / "ledger.npz")
