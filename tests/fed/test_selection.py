"""A rule selects the cohorts: it reads the losses of the ledger, and a resumed run continues it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax
from hiso_jax import fed, selections
from tests.fed.problems import assert_trees_identical, digits_population, linear_task

CLIENTS = 20


def run(rule, rounds=8, algorithm=None, **storage):
    config = fed.SimulationConfig(rounds=rounds, cohort=4, eval_every=2, batch_size=4)
    return fed.Simulation(
        linear_task(),
        hiso_jax.decomfl(0.05) if algorithm is None else algorithm,
        digits_population(CLIENTS),
        config,
        participation=fed.Participation(fed.Bernoulli(0.7), select=rule),
        storage=fed.Storage(**storage) if storage else None,
    ).run()


def in_turn(key, round_number, state):
    return (state.cohort * round_number + jnp.arange(state.cohort)) % len(state.loss)


def reading(key, round_number, state):
    """Clients that never counted first, then the highest losses; the key breaks no ties."""
    return jnp.argsort(jnp.where(jnp.isnan(state.loss), -jnp.inf, -state.loss))[: state.cohort]


def by_hand(records, clients):
    """The cohorts of ``reading`` from the records, in NumPy."""
    loss, cohorts = np.full(clients, np.nan, np.float32), []
    for cohort, valid, mean in zip(records.cohort, records.valid, records.loss, strict=True):
        order = np.argsort(np.where(np.isnan(loss), -np.inf, -loss), kind="stable")
        cohorts.append(order[: len(cohort)])
        loss[cohort[valid]] = mean
    return np.array(cohorts)


def test_a_rule_selects_the_cohorts():
    cohorts = run(in_turn).records.cohort
    np.testing.assert_array_equal(cohorts, (4 * np.arange(8)[:, None] + np.arange(4)) % CLIENTS)


def test_a_rule_reads_the_losses_of_the_ledger():
    records = run(reading).records
    assert not records.valid.all()
    np.testing.assert_array_equal(records.cohort, by_hand(records, CLIENTS))


def test_a_resumed_run_selects_the_same(tmp_path):
    whole = run(reading, rounds=8)
    run(reading, rounds=3, directory=tmp_path)
    resumed = run(reading, rounds=8, directory=tmp_path, resume=True)
    np.testing.assert_array_equal(resumed.records.cohort, whole.records.cohort)
    assert_trees_identical(resumed.params, whole.params)
    for other in (in_turn, None):
        with pytest.raises(ValueError, match="its select is made of other functions"):
            run(other, rounds=9, directory=tmp_path, resume=True)


def test_a_run_without_a_rule_goes_on_without_one(tmp_path):
    run(None, rounds=3, directory=tmp_path)
    with pytest.raises(ValueError, match="its select is made of other functions"):
        run(in_turn, rounds=8, directory=tmp_path, resume=True)
    assert run(None, rounds=8, directory=tmp_path, resume=True).rounds == 8


def test_the_highest_losses_of_a_larger_draw():
    rule = selections.highest_loss(candidates=3)
    state = fed.SelectionState(jnp.arange(30.0), jnp.zeros(30, jnp.int32), 5)
    key = jax.random.key(3)
    drawn = np.asarray(fed.sample_cohort(key, 30, 15))
    np.testing.assert_array_equal(np.sort(rule(key, jnp.int32(0), state)), np.sort(drawn)[-5:])
    unknown = dataclasses.replace(state, loss=state.loss.at[drawn[:2]].set(jnp.nan))
    assert {*drawn[:2]} <= {*np.asarray(rule(key, jnp.int32(0), unknown)).tolist()}
    assert len(np.unique(run(rule).records.cohort[0])) == 4


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (3, r"select must be a function\(key, round_number, state\) → int \[C\], .*; got 3"),
        (lambda key: 0, "which JAX can compile; it fails with: .* takes 1 positional argument but 3"),
        (lambda key, number, state: jnp.arange(3), r"for 4 clients it returns int32 of shape \(3,\)"),
        (lambda key, number, state: state.loss[:4], r"for 4 clients it returns float32 of shape \(4,\)"),
        (lambda key, number, state: jnp.zeros(4, int), "select must return distinct clients; for round 0 .* 0 twice"),
        (
            lambda key, number, state: jnp.arange(4) + 17,
            "select must return ids of 0 to 19; for round 0 .* 20",
        ),
    ],
)
def test_what_is_no_selection_is_refused(rule, sentence):
    with pytest.raises(hiso_jax.ParameterError, match=sentence):
        run(rule)


def test_a_private_run_selects_uniformly():
    algorithm = hiso_jax.channels.private_mean(clip_norm=1.0, noise_multiplier=1.0).into(
        fed.Algorithm(hiso_jax.decomfl(0.05))
    )
    with pytest.raises(hiso_jax.ParameterError, match="select must not be given in a private run"):
        run(in_turn, algorithm=algorithm)


@pytest.mark.thorough
def test_a_sweep_selects_as_a_run_does():
    population, config = digits_population(CLIENTS), fed.SimulationConfig(rounds=4, cohort=4, eval_every=4)
    participation = fed.Participation(select=reading)
    grid = fed.Grid((0.05,), (0,))
    swept = fed.sweep(linear_task(), hiso_jax.decomfl, [population], config, grid, participation=participation).metrics[
        "loss"
    ]
    alone = fed.Simulation(linear_task(), hiso_jax.decomfl(0.05), population, config, participation=participation).run()
    np.testing.assert_allclose(swept.reshape(-1)[-1], alone.metrics[-1].metrics["loss"], rtol=1e-5)


@pytest.mark.thorough
def test_names_select_too(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import jax.numpy as jnp\n"
        "def fixed(*, first: int = 2):\n"
        '    """The same clients in every round.\n\n    Args:\n      first: the first of them.\n    """\n'
        "    return lambda key, number, state: first + jnp.arange(state.cohort)\n"
    )
    numbers = dict(rounds=2, eval_every=2, clients=CLIENTS, cohort=3)
    mine = hiso_jax.Experiment(select=f"{tmp_path}/mine.py:fixed", first=5, **numbers).run()
    np.testing.assert_array_equal(mine.records.cohort, [[5, 6, 7]] * 2)
    named = hiso_jax.Experiment(select="highest-loss", candidates=1.0, **numbers).run()
    uniform = hiso_jax.Experiment(**numbers).run()
    np.testing.assert_array_equal(np.sort(named.records.cohort), np.sort(uniform.records.cohort))


def test_a_sweep_checks_what_a_rule_selects():
    def twice(key, round_number, state):
        return jnp.where(round_number == 3, 7, jnp.arange(state.cohort))

    config = fed.SimulationConfig(rounds=6, cohort=4, eval_every=2, batch_size=4)
    grid = fed.Grid([0.01, 0.02], [0])
    participation = fed.Participation(select=twice)
    with pytest.raises(hiso_jax.ParameterError, match="for round 3 it returned client 7 twice"):
        fed.sweep(
            linear_task(), hiso_jax.decomfl, [digits_population(CLIENTS)], config, grid, participation=participation
        )
