"""In double precision sharded and unsharded runs stay together for fifty rounds."""

import functools

import jax
import numpy as np
import pytest

import hiso_jax
from hiso_jax import fed
from tests.fed.problems import digits_population, double_task
from tests.marks import slow


def run(mesh):
    config = fed.SimulationConfig(
        rounds=50, cohort=6, perturbations=2, batch_size=8, eval_every=50, rounds_per_dispatch=50
    )
    return fed.Simulation(double_task(), hiso_jax.hiso(0.02), digits_population(), config, mesh=mesh).run()


@functools.cache
def unsharded():
    return run(None)


@pytest.mark.parametrize("mesh", [*(slow(name) for name in ("1", "2", "4", "8")), "2x4"], indirect=True)
def test_fifty_rounds_in_double_precision(mesh, x64):
    result, alone = run(mesh), unsharded()
    assert result.rounds == 50
    for one, other, start in zip(
        *(jax.tree.leaves(tree) for tree in (result.params, alone.params, alone.initial_params)), strict=True
    ):
        assert one.dtype == np.float64
        np.testing.assert_allclose(one, other, atol=1e-8)
        assert np.abs(np.asarray(other) - np.asarray(start)).max() > 1e-2
