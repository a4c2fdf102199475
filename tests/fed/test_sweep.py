"""A grid of runs as one program equals the separate runs, and the shared-target metric chooses its best."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax
from hiso_jax import Experiment, fed
from hiso_jax.checks import ParameterError
from hiso_jax.fed.run import monitor
from hiso_jax.fed.run.secret import of_setting
from tests.fed.problems import double_task, linear_task

RATES, SEEDS, MUS = (0.005, 0.02, 1e6), (0, 3), (1e-3, 1e-4)
CONFIG = fed.SimulationConfig(rounds=24, cohort=4, local_steps=2, perturbations=2, batch_size=8, eval_every=10)


def populations(task):
    return [fed.dirichlet(task.train["label"], 12, alpha=0.5, seed=seed) for seed in SEEDS]


def run(task, budget, **settings):
    config = dataclasses.replace(CONFIG, memory_budget=budget)
    grid = {"learning_rates": RATES, "seeds": SEEDS, "mus": MUS}
    return fed.sweep(task, hiso_jax.hiso, populations(task), config, fed.Grid(**grid), **settings)


@pytest.mark.thorough
def test_every_setting_is_the_run_it_stands_for(x64):
    task, notified = double_task(), []
    side_by_side = run(task, 2**40, callback=lambda done, rounds: notified.append((done, rounds)))
    assert notified == [(0, 24), (10, 24), (20, 24), (24, 24)]
    assert not side_by_side.interrupted
    np.testing.assert_array_equal(side_by_side.rounds, [0, 10, 20, 24])
    assert side_by_side.metrics["loss"].shape == (2, 2, 3, 4)
    assert (side_by_side.diverged_at[:, :, 2] >= 0).all()
    assert (side_by_side.diverged_at[:, :, :2] == monitor.NEVER).all()
    assert (side_by_side.final()[:, :, 2] == -np.inf).all()
    assert side_by_side.metric == fed.Metric("accuracy")

    in_turn = run(task, 1)
    np.testing.assert_array_equal(in_turn.diverged_at, side_by_side.diverged_at)
    kept = np.s_[:, :, :2]
    np.testing.assert_allclose(in_turn.metrics["loss"][kept], side_by_side.metrics["loss"][kept], rtol=1e-6)

    # The clients' own steps follow the grid's rate, too.
    own = dataclasses.replace(CONFIG, seed=SEEDS[1], mu=MUS[1], local_learning_rate=RATES[1])
    alone = fed.Simulation(task, hiso_jax.hiso(RATES[1]), populations(task)[1], own).run()
    losses = [row.metrics["loss"] for row in alone.metrics]
    # Rates and μ of a grid are float32.
    np.testing.assert_allclose(side_by_side.metrics["loss"][1, 1, 1], losses, rtol=1e-5)

    done = []
    stopped = run(task, 2**40, callback=lambda now, rounds: done.append(now) or now >= 10)
    assert stopped.interrupted
    np.testing.assert_array_equal(stopped.rounds, [0, 10])
    np.testing.assert_array_equal(stopped.metrics["loss"], side_by_side.metrics["loss"][..., :2])


def made_up(accuracy, diverged=None, rates=(0.1, 0.2, 0.3)):
    accuracy = np.array(accuracy, float)[:, None]
    return fed.SweepResult(
        seeds=tuple(range(len(accuracy))),
        mus=(1e-3,),
        learning_rates=rates,
        rounds=np.arange(accuracy.shape[-1]) * 10,
        metric=fed.Metric("accuracy"),
        metrics={"accuracy": accuracy},
        diverged_at=np.full(accuracy.shape[:3], -1) if diverged is None else np.array(diverged)[:, None],
        interrupted=False,
        compile_seconds=0.0,
        run_seconds=0.0,
    )


def test_the_best_reaches_the_target_soonest_with_every_seed():
    slow, fast, high = [0.1, 0.5, 0.9, 0.9, 0.9], [0.1, 0.9, 0.9, 0.9, 0.9], [0.1, 0.1, 0.97, 0.97, 0.97]
    result = made_up([[slow, fast, high], [slow, fast, high]])
    best = result.best(0.85)
    assert (best.learning_rate, best.rounds_to_target, best.at_edge) == (0.2, 10, False)
    assert best.final == pytest.approx(0.9)
    # A setting that misses the target with one seed, or diverges, does not count.
    result = made_up([[slow, fast, high], [slow, slow[:2] * 2 + [0.2], high]])
    assert result.best(0.85).learning_rate == 0.3
    result = made_up([[slow, fast, high]], diverged=[[-1, 30, 30]])
    assert result.best(0.85).learning_rate == 0.1
    np.testing.assert_array_equal(result.rounds_to(0.85), [[[20, math.inf, math.inf]]])


def test_a_diverged_run_is_never_best_whatever_the_values():
    result = made_up([[[-2.0, -0.5], [-2.0, -9.0]]], diverged=[[-1, 5]], rates=(0.1, 0.2))
    assert result.best(None).learning_rate == 0.1


def test_without_a_target_the_highest_end_is_best():
    result = made_up([[[0.1, 0.5], [0.1, 0.6], [0.1, 0.7]], [[0.1, 0.6], [0.1, 0.7], [0.1, 0.3]]])
    assert result.best(None).learning_rate == 0.2
    unreached = result.best(0.95)
    assert (unreached.learning_rate, unreached.rounds_to_target) == (0.2, None)
    assert made_up([[[0.1, 0.5], [0.1, 0.6], [0.1, 0.7]]]).best(None).at_edge


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"learning_rates": ()}, "learning_rates must name at least one value"),
        ({"learning_rates": (0.1, -1.0)}, "learning_rates must be a positive finite number, got -1.0"),
        ({"mus": (0.0,)}, "mus must be a positive finite number, got 0.0"),
        ({"seeds": (1, 2, 3)}, "populations must be one for each of the 3 seeds, got 2"),
    ],
)
def test_grids_that_cannot_be_are_refused(settings, sentence):
    task = linear_task()

    def run():
        grid = fed.Grid(**({"learning_rates": (0.1,), "seeds": SEEDS} | settings))
        return fed.sweep(task, hiso_jax.hiso, populations(task), CONFIG, grid)

    with pytest.raises(ValueError, match=sentence):
        run()


def test_settings_of_a_private_sweep_have_their_own_noise():
    secret, seed_key, table = jax.random.key(0), jax.random.key(1), jnp.ones(5)
    keys = [
        of_setting(secret, seed_key, *numbers)
        for numbers in [(0.1, 1e-3), (0.1, 1e-3, 0.5), (0.1, 1e-3, 0.6), (0.1, 1e-3, table), (0.1, 1e-3, table * 0.5)]
    ]
    assert len({bytes(np.asarray(jax.random.key_data(key))) for key in keys}) == len(keys)
    # That of a setting with one rate has been this one since release 0.3.
    first = secret
    words = [jax.random.bits(seed_key), *(np.float32(x).view(np.uint32) for x in (0.1, 1e-3))]
    for word in words:
        first = jax.random.fold_in(first, word)
    np.testing.assert_array_equal(jax.random.key_data(first), jax.random.key_data(keys[0]))


def test_a_search_does_not_read_the_losses_of_a_private_run():
    with pytest.raises(ParameterError, match="learning_rate must be a number in a private run"):
        Experiment(algorithm="decomfl", combine="private_mean", noise_multiplier=1.0, learning_rate=0.01).find_rate()
