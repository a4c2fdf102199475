"""A federation along directions of low rank: one product for a whole cohort, and a replay to the bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax
from hiso_jax import fed, zo
from hiso_jax.fed.devices.execution import inner_jaxprs
from tests.callbacks import StopAt
from tests.fed.problems import assert_trees_identical, digits_population, digits_task

SLOW = pytest.mark.slow


def run(tx, task=None, **settings):
    defaults = {"rounds": 6, "cohort": 5, "batch_size": 8, "eval_every": 6, "local_learning_rate": 0.01}
    config = fed.SimulationConfig(**(defaults | settings))
    return fed.Simulation(task or digits_task(), tx, digits_population(), config).run()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("form", "groups", "perturbations", "rank"),
    [
        (None, 1, 1, 1),
        ("factored", None, 3, 2),
        *(
            pytest.param(*case, marks=SLOW)
            for case in [
                (None, 2, 2, 1),
                ("factored", 1, 5, 4),
                ("factored", 1, 1, 1),
                ("diagonal", 2, 2, 1),
                (None, 1, 20, 1),
            ]
        ),
    ],
)
def test_kept_made_again_and_replayed_they_give_the_same_bits(form, groups, perturbations, rank):
    sampler = zo.Directions(zo.LowRank(rank), groups=groups)
    tx = (
        hiso_jax.decomfl(0.02, sampler=sampler)
        if form is None
        else hiso_jax.hiso(0.02, curvature_form=form, sampler=sampler)
    )
    kept = run(tx, perturbations=perturbations, directions="keep")
    again = run(tx, perturbations=perturbations, directions="regenerate", rounds_per_dispatch=1)
    np.testing.assert_array_equal(kept.records.scalars, again.records.scalars)
    assert_trees_identical((kept.params, kept.state), (again.params, again.state))
    for dispatch in (None, 1):
        rebuilt = fed.replay(kept.initial_params, tx, kept.records, rounds_per_dispatch=dispatch)
        assert_trees_identical((kept.params, kept.state), rebuilt)


@pytest.mark.thorough
@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=SLOW)])
def test_a_task_that_says_nothing_measures_the_same(steps):
    """Its perturbed weights are made dense, and the scalars are the same up to rounding."""
    tx, settings = hiso_jax.hiso(0.02, sampler="low_rank"), {"rounds": 1, "local_steps": steps, "perturbations": 2}
    own, plain = run(tx, **settings), run(tx, dataclasses.replace(digits_task(), perturbed_as=None), **settings)
    tolerance = 16 * 2**-23 * float(own.records.loss[0]) / 1e-3
    np.testing.assert_allclose(own.records.scalars, plain.records.scalars, atol=tolerance)


def products(jaxpr, size):
    """The number of rows of each product with a weight of ``size`` numbers in a program."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and equation.invars[1].aval.size == size:
            found.append(equation.invars[0].aval.size // 64)
        for inner in inner_jaxprs(equation):
            found += products(inner, size)
    return found


def test_groups_share_one_product_with_every_weight():
    task, clients, batch = digits_task(), 6, 4
    params = task.init(jax.random.key(0))
    execution = fed.ExecutionSettings(perturbed_as=task.perturbed_as)
    inputs = {
        name: jnp.asarray(rows[: clients * batch]).reshape(clients, 1, batch, *rows.shape[1:])
        for name, rows in task.train.items()
    }

    def rows(groups):
        tx = hiso_jax.decomfl(0.1, sampler=zo.Directions(zo.LowRank(), groups=groups))
        round_ = fed.make_round(task.loss, tx, local_steps=1, num_perturbations=2, mu=1e-3, execution=execution)
        arguments = params, tx.init(params), inputs, jnp.ones(clients, bool), jax.random.key(1)
        return products(jax.make_jaxpr(round_)(*arguments).jaxpr, 64 * 32)

    # One product is for the unperturbed losses, one is in the loop over directions; each has the cohort's examples.
    assert rows(1) == rows(6) == [clients * batch, clients * batch]


@pytest.mark.thorough
def test_a_run_saves_and_resumes_factors(tmp_path):
    tx, settings = hiso_jax.hiso(0.02, sampler="low_rank"), {"rounds": 6, "perturbations": 2, "rounds_per_dispatch": 2}
    config = fed.SimulationConfig(**settings, cohort=5, batch_size=8, eval_every=6)
    whole = run(tx, **settings, local_learning_rate=None)

    def part(storage, callbacks=()):
        return fed.Simulation(digits_task(), tx, digits_population(), config, storage=storage, callbacks=callbacks)

    first = part(fed.Storage(tmp_path / "run", snapshot_every=2))
    first.callbacks = (StopAt(4),)
    assert first.run().interrupted
    resumed = part(fed.Storage(tmp_path / "run", resume=True)).run()
    assert_trees_identical((resumed.params, resumed.state), (whole.params, whole.state))
