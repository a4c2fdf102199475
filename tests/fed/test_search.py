"""Equal budgets: the numbers of tuning runs, and the cost of rounds."""

import math
from dataclasses import replace
from fractions import Fraction

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hiso_jax
from hiso_jax import algorithms, fed, tasks
from tests.fed.problems import digits_population, linear_task

GUESS = 0.01


def searched(best: float, tries: int) -> dict[float, float]:
    """Tried rates and their scores; the score grows with the distance from ``best``."""
    tried: dict[float, float] = {}
    while len(tried) < tries:
        for rate in fed.next_rates(tried, GUESS)[: tries - len(tried)]:
            assert rate not in tried
            tried[rate] = abs(math.log(rate / best))
    return tried


@given(st.floats(1e-4, 1.0))
def test_the_best_of_few_rates_is_near_and_inside(best):
    """From a guess up to a hundred times off, nine rates find the best within a factor of about √3."""
    tried = searched(best, 9)
    found = min(tried, key=tried.get)
    assert min(tried) < found < max(tried)
    assert abs(math.log(found / best)) <= math.log(3) / 2 + 0.02


@pytest.mark.parametrize("best", [0.0021, 0.0173, 1.0, 1e-300, 1e300])
def test_a_search_of_any_number_of_tries_ends(best):
    """Three digits cannot separate the middle of a narrow gap from its ends."""
    tried: dict[float, float] = {}
    for _ in range(700):
        wanted = fed.next_rates(tried, GUESS)
        assert not set(wanted) & set(tried)
        assert all(0 < rate < math.inf for rate in wanted)
        tried |= {rate: abs(math.log(rate) - math.log(best)) for rate in wanted}
        if not wanted:
            break
    assert len(tried) > 30
    # Near the limits of floating point, the middle of a gap may be out of range.
    assert min(tried.values()) < (0.02 if 1e-100 < best < 1e100 else 1)


def test_a_good_guess_is_refined():
    assert sorted(searched(0.011, 5)) == [0.00333, 0.00577, 0.01, 0.0173, 0.03]


@given(st.lists(st.integers(0, 360), min_size=3, max_size=8), st.integers(1, 360))
def test_a_target_is_reached_where_the_exact_mean_of_three_evaluations_is(counts, target):
    """The values are shares of 360 examples, and the means are computed as fractions."""
    means = [Fraction(sum(counts[i : i + 3]), 3) for i in range(len(counts) - 2)]
    expected = next((place for place, mean in enumerate(means) if mean >= target), None)
    found = fed.first_at_target([count / 360 for count in counts], target / 360)
    assert found == expected


def test_a_run_at_its_target_from_the_first_evaluation_on_is_at_round_0():
    assert all(fed.first_at_target([n / 360] * 3, n / 360) == 0 for n in range(1, 361))
    assert fed.first_at_target([math.inf, 1.0, 2.0], 0.5) == 0
    assert fed.first_at_target([0.47, 0.47, 0.71], 0.55) == 0
    assert fed.first_at_target([0.549999] * 3, 0.55) is None
    assert fed.first_at_target([math.nan, 1.0, 2.0], 0.5) is None


def test_where_all_diverge_smaller_rates_follow():
    tried = dict.fromkeys(fed.next_rates({}, GUESS), math.inf)
    assert fed.next_rates(tried, GUESS) == [0.00111]


@pytest.mark.thorough
def test_a_rate_is_found_where_nobody_comes_to_some_rounds():
    config = fed.SimulationConfig(rounds=8, cohort=2, batch_size=4, eval_every=8)
    seldom = fed.Participation(fed.Bernoulli(0.25))
    rates = [0.01, 0.003]
    found = fed.find_rate(linear_task(), hiso_jax.decomfl, digits_population(), config, rates, participation=seldom)
    assert found.learning_rates == (0.003, 0.01)
    assert np.isfinite(found.losses).all()
    run = fed.Simulation(linear_task(), hiso_jax.decomfl(0.01), digits_population(), config, participation=seldom).run()
    late = np.asarray(run.records.loss)[4:]
    assert np.isnan(late).any()
    np.testing.assert_allclose(found.losses[1], np.nanmean(late), rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "passes"), [("decomfl", 6), ("hizoo", 11), ("mosaic", 65), ("fed_avg", 3)])
def test_a_round_costs_what_a_run_counts(name, passes):
    task, population = tasks.digits(), digits_population()
    algorithm = algorithms.load(name).build(1e-3, {})
    fleet = fed.Fleet(fed.LogNormal(0.1, 0.5), fed.LogNormal(1e5, 0.5), fed.LogNormal(1e5, 0.5))
    config = fed.SimulationConfig(rounds=300 if name == "decomfl" else 2, cohort=4, eval_every=300)
    participation = fed.Participation(fleet=fleet)
    cost = fed.round_costs(task, algorithm, config, population.num_clients, participation)
    result = fed.Simulation(task, algorithm, population, config, participation=participation).run()
    assert cost.passes == 4 * passes == result.forward_passes / result.rounds
    assert cost.bytes == result.traffic["bytes_up"] / result.rounds
    if name == "decomfl":
        # Twelve clients have their own speeds: the mean over many cohorts is the run's, except for the run's own draws.
        np.testing.assert_allclose(cost.seconds, result.simulated_seconds / result.rounds, rtol=0.1)


@pytest.mark.thorough
def test_an_asynchronous_round_costs_what_a_run_counts():
    """A budget of passes, bytes or seconds buys more rounds with a buffer than rounds of whole cohorts."""
    task, population, cohort, buffer = linear_task(), digits_population(200), 20, 5
    fleet = fed.Fleet(fed.LogNormal(0.1, 1.0), fed.LogNormal(1e5, 0.5), fed.LogNormal(1e5, 0.5))
    config = fed.SimulationConfig(rounds=600, cohort=cohort, buffer=buffer, batch_size=4, eval_every=600)
    participation, algorithm = fed.Participation(fleet=fleet), algorithms.load("decomfl").build(0.01, {})
    cost = fed.round_costs(task, algorithm, config, 200, participation)
    result = fed.Simulation(task, algorithm, population, config, participation=participation).run()
    assert cost.passes == result.forward_passes / result.rounds
    assert cost.bytes == result.traffic["bytes_up"] / result.rounds
    np.testing.assert_allclose(cost.seconds, result.simulated_seconds / result.rounds, rtol=0.1)
    few = replace(config, rounds=60)
    found = fed.find_rate(task, hiso_jax.decomfl, population, few, [0.01], participation=participation)
    tried = fed.Simulation(task, algorithm, population, few, participation=participation).run()
    assert (found.bytes_up, found.forward_passes) == (tried.traffic["bytes_up"], tried.forward_passes)
    # A search knows no missed rounds in its clock, so a few answers come in another order.
    np.testing.assert_allclose(found.bytes_down, tried.traffic["bytes_down"], rtol=0.01)


def test_what_a_client_holds_first_is_read_where_not_all_is():
    task, population = tasks.digits(), digits_population()
    params = task.init(jax.random.key(0))
    found = fed.client_metrics(task, params, population, most=3)
    for client in (0, 7):
        own = population.indices[population.offsets[client] : population.offsets[client] + 3]
        batch = jax.tree.map(lambda array, own=own: array[own], task.train)
        np.testing.assert_allclose(found["loss"][client], np.mean(task.metrics(params, batch)["loss"]), rtol=1e-5)
