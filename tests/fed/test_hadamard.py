"""Runs along rows of a Hadamard matrix: replayed, resumed and shared to the bit, by differences and by projections."""

import pytest

import hiso_jax
from hiso_jax import algorithms, fed
from hiso_jax.fed.ledger import delta_of, load_delta, save_delta
from tests.callbacks import StopAt
from tests.fed.problems import assert_trees_identical
from tests.fed.test_projections import projected, run
from tests.marks import slow, thorough


def algorithm(name, *, backprop=False):
    made = algorithms.load(name).build(0.05, {"sampler": "hadamard"})
    return projected(made) if backprop else made


@pytest.mark.parametrize(
    ("name", "backprop", "steps"),
    [
        thorough("mosaic", False, 1),
        thorough("mosaic", True, 2),
        slow("hiso", False, 2),
        slow("decomfl", True, 1),
        slow("fed_mpdd", False, 1),
    ],
)
def test_a_run_is_replayed_resumed_and_shared_to_the_bit(tmp_path, name, backprop, steps):
    chosen = algorithm(name, backprop=backprop)
    # More directions than the smallest leaf has coordinates.
    settings = {"local_steps": steps, "perturbations": 40, "rounds_per_dispatch": 2}
    run(chosen, storage=fed.Storage(tmp_path / "run"), callbacks=[StopAt(4)], **settings)
    result = run(chosen, storage=fed.Storage(tmp_path / "run", resume=True), **settings)
    whole = run(chosen, **settings)
    assert_trees_identical((result.params, result.state), (whole.params, whole.state))
    rebuilt = fed.replay(result.initial_params, chosen, result.records)
    assert_trees_identical((result.params, result.state), rebuilt)
    save_delta(delta_of(fed.load(tmp_path / "run")), tmp_path / "run.safetensors")
    applied = fed.apply_delta(load_delta(tmp_path / "run.safetensors"), result.initial_params, chosen)
    assert_trees_identical(applied, result.params)


def test_kept_directions_are_refused():
    with pytest.raises(hiso_jax.ParameterError, match="directions must be regenerate with the sampler hadamard"):
        run(algorithm("mosaic"), directions="keep")


def test_a_pool_has_no_such_directions():
    with pytest.raises(hiso_jax.ParameterError, match="sampler must not be hadamard for directions from a pool"):
        algorithm("fed_kseed")


@pytest.mark.thorough
def test_own_directions_of_clients_differ():
    """With shared directions the run has another result."""
    own = algorithm("mosaic")
    shared = algorithms.load("mosaic").build(0.05, {"sampler": "hadamard", "direction_groups": "shared"})
    first, second = (run(each).params for each in (own, shared))
    with pytest.raises(AssertionError):
        assert_trees_identical(first, second)
