"""Attendance, the time of clients, and the effect of both on a run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax
from hiso_jax import fed
from hiso_jax.fed.population import ABSENT, DROPPED, LATE, REPORTED, Work, attend
from tests.fed.problems import assert_trees_identical, digits_population, linear_task

CLIENTS = jnp.arange(20_000)
KEY, TRAITS = jax.random.key(1), jax.random.key(2)


@jax.jit
def _attend(participation, clients, number, down):
    key = jax.random.fold_in(KEY, number)
    return attend(participation, key, TRAITS, clients, number, Work(down, 28, 6))


def statuses(participation, clients=CLIENTS, number=0, down=0.0):
    result = _attend(participation, clients, jnp.int32(number), jnp.full(clients.shape, down))
    return np.asarray(result.status), float(result.seconds)


def share(status, which):
    return np.mean(status == which)


def test_everybody_reports_unless_told_otherwise():
    status, seconds = statuses(fed.Participation())
    assert (status == REPORTED).all()
    assert seconds == 0


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_bernoulli(rate):
    status, _ = statuses(fed.Participation(fed.Bernoulli(rate)))
    assert share(status, REPORTED) == pytest.approx(rate, abs=0.02)
    assert share(status, ABSENT) == pytest.approx(1 - rate, abs=0.02)


def mean_presence(availability, rounds=60):
    return np.mean(
        [statuses(fed.Participation(availability), CLIENTS[:2000], r)[0] == REPORTED for r in range(rounds)], 0
    )


def test_clients_have_their_own_rates():
    rates = np.linspace(0, 1, 2000)
    assert np.corrcoef(mean_presence(fed.ClientRates(rates)), rates)[0, 1] > 0.95
    own = mean_presence(fed.UniformRates(0.2, 0.8))
    assert own.mean() == pytest.approx(0.5, abs=0.02)
    # The variance over clients is that of uniform rates plus that of 60 coin tosses.
    assert own.var() == pytest.approx(0.6**2 / 12 + (0.25 - 0.03) / 60, rel=0.15)


def test_the_time_of_day():
    day = [statuses(fed.Participation(fed.Diurnal(0.5, period=24.0)), CLIENTS[:2000], r)[0] for r in range(48)]
    present = np.array(day) == REPORTED
    assert present.mean() == pytest.approx(0.5, abs=0.02)
    # A client's presence follows a wave of one day: it correlates more with a day later than with half a day later.
    later, opposite = ((present[:24] == np.roll(present, -shift, 0)[:24]).mean() for shift in (24, 12))
    assert later - opposite > 0.2


def test_a_trace_is_followed_and_starts_again(tmp_path):
    table = np.array([[1, 0, 1], [0, 0, 1]])
    np.savetxt(tmp_path / "trace.csv", table, fmt="%d", delimiter=",")
    np.save(tmp_path / "trace.npy", table.astype(bool))
    for name in ("trace.csv", "trace.npy"):
        participation = fed.Participation(fed.load_trace(tmp_path / name))
        for number in range(5):
            status, _ = statuses(participation, jnp.array([4, 0, 5, 7]), number)
            np.testing.assert_array_equal(status == REPORTED, table[number % 2, [1, 0, 2, 1]] == 1)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("trace.csv", "1,0\n1\n", "path must name a .npy or .csv file of 0s and 1s"),
        ("trace.csv", "1,2\n", "path must name a table of 0s and 1s only"),
        ("trace.csv", "yes,no\n", "path must name a .npy or .csv file"),
        ("trace.csv", "", "path must"),
        ("trace.npy", "not an array", "path must name a .npy or .csv file"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path, name, content, sentence):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        fed.load_trace(str(tmp_path / name))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: fed.Trace(np.array([[2, 0]])), "table must be a rectangle of 0s and 1s only"),
        (lambda: fed.Trace([1, 0]), "table must be a rectangle of 0s and 1s only"),
        (lambda: fed.UniformRates(0.9, 0.1), "low must be at most high, 0.1, got 0.9"),
    ],
)
def test_tables_and_rates_that_cannot_be_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def fleet(compute=0.1, spread=0.0, down=1e6, up=1e6):
    return fed.Fleet(fed.LogNormal(compute, spread), fed.LogNormal(down), fed.LogNormal(up))


def test_the_clock_adds_download_computing_and_upload():
    _, seconds = statuses(fed.Participation(fleet=fleet(compute=0.5, down=1e3, up=1e2)), CLIENTS[:5], down=4e3)
    assert seconds == pytest.approx(4e3 / 1e3 + 6 * 0.5 + 28 / 1e2)


def test_the_clock_adds_the_directions_that_a_client_makes():
    slow = dataclasses.replace(fleet(compute=0.5), direction_seconds=0.25)
    seconds = slow.seconds(TRAITS, CLIENTS[:2], Work(jnp.zeros(2), 0.0, 2.0, jnp.array([0.0, 8.0])))
    np.testing.assert_allclose(seconds, [1.0, 3.0])


def test_speeds_are_log_normal_and_a_clients_own():
    speeds = fleet(compute=0.1, spread=0.7)
    seconds = np.asarray(speeds.seconds(TRAITS, CLIENTS, Work(jnp.zeros(len(CLIENTS)), 0.0, 1.0)))
    assert np.median(seconds) == pytest.approx(0.1, rel=0.03)
    assert np.log(seconds).std() == pytest.approx(0.7, rel=0.03)
    some = jnp.array([17, 3])
    np.testing.assert_allclose(speeds.seconds(TRAITS, some, Work(jnp.zeros(2), 0.0, 1.0)), seconds[[17, 3]])


def test_a_deadline_leaves_stragglers_behind_and_bounds_the_round():
    waiting = fed.Participation(fleet=fleet(spread=0.7))
    patient, seconds = statuses(waiting)
    assert (patient == REPORTED).all()
    assert seconds > 5
    # Half of the clients take longer than the median.
    status, seconds = statuses(fed.Participation(fleet=fleet(spread=0.7), deadline=0.6))
    assert share(status, LATE) == pytest.approx(0.5, abs=0.02)
    assert seconds == pytest.approx(0.6)
    _, seconds = statuses(fed.Participation(fleet=fleet(), deadline=1e6))
    assert seconds == pytest.approx(0.6, rel=1e-3)


def test_dropping_out_of_a_round():
    status, seconds = statuses(fed.Participation(fed.Bernoulli(0.5), dropout=0.2, fleet=fleet(), deadline=9.0))
    assert share(status, ABSENT) == pytest.approx(0.5, abs=0.02)
    assert share(status, DROPPED) == pytest.approx(0.1, abs=0.02)
    # The server does not know that clients dropped out, and waits.
    assert seconds == 9.0


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: fed.Bernoulli(1.5), "rate must be between 0 and 1, got 1.5"),
        (lambda: fed.ClientRates(np.array([0.5, 2.0])), "rates must be one number between 0 and 1 for each client"),
        (lambda: fed.Diurnal(0.5, period=0.0), "period must be a positive finite number, got 0.0"),
        (lambda: fed.Participation(dropout=-0.1), "dropout must be between 0 and 1, got -0.1"),
        (lambda: fed.Participation(deadline=1.0), "deadline needs a fleet"),
        (lambda: fed.Participation(fleet=fleet(), deadline=-1.0), "deadline must be a positive finite number"),
        (lambda: fed.LogNormal(0.0), "median must be a positive finite number, got 0.0"),
        (lambda: fed.LogNormal(1.0, -1.0), "spread must be a finite number ≥ 0, got -1.0"),
    ],
)
def test_rules_that_cannot_be_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_rates_must_be_one_for_each_client():
    rules = fed.Participation(fed.ClientRates([0.5] * 11))
    config = fed.SimulationConfig(cohort=4)
    with pytest.raises(ValueError, match="rates must be one for each of 12 clients, got 11"):
        fed.Simulation(linear_task(), hiso_jax.hiso(0.02), digits_population(), config, participation=rules)


def run(rate, rounds):
    """A run in which the rules enter the program as data: another rate needs no other program."""
    rules = fed.Participation(fed.Bernoulli(rate), dropout=0.2, fleet=fleet(spread=0.5), deadline=0.3)
    config = fed.SimulationConfig(
        rounds=rounds, cohort=6, perturbations=2, batch_size=8, eval_every=15, weighting="examples"
    )
    tx = hiso_jax.hiso(0.02)
    return tx, fed.Simulation(linear_task(), tx, digits_population(), config, participation=rules).run()


@pytest.mark.thorough
def test_a_run_counts_who_reported_and_charges_the_rest():
    population = digits_population()
    tx, result = run(0.7, 30)
    records = result.records
    attendance = records.attendance
    assert {ABSENT, DROPPED, LATE, REPORTED} == set(attendance.reshape(-1))
    np.testing.assert_array_equal(records.valid, attendance == REPORTED)
    assert result.attendance == {
        name: int((attendance == status).sum()) for status, name in enumerate(("absent", "dropped", "late", "reported"))
    }

    # The aggregate is a mean over the clients that reported, weighted by their numbers of examples.
    weights = np.where(records.valid, np.asarray(population.sizes)[records.cohort], 0).astype(np.float64)
    some = weights.sum(1) > 0
    expected = (records.scalars * weights[..., None, None])[some].sum(1) / weights[some].sum(1)[:, None, None]
    np.testing.assert_allclose(records.aggregate[some], expected, rtol=1e-4, atol=1e-5)

    # The same bytes, counted client by client.
    synced, down, up = {}, 0, 0
    for number, (cohort, status) in enumerate(zip(records.cohort, attendance, strict=True)):
        for client, what in zip(cohort.tolist(), status, strict=True):
            if what != ABSENT:
                down += 8 + (8 if client not in synced else 0) + 8 * (number - synced.get(client, 0))
                up += 16 if what in (LATE, REPORTED) else 0
                synced[client] = number
    assert (result.traffic["bytes_down"], result.traffic["bytes_up"]) == (down, up)
    assert result.forward_passes == int((attendance != ABSENT).sum()) * 3
    assert 0 < result.simulated_seconds <= 30 * 0.3 + 1e-3
    assert result.metrics[-1].simulated_seconds == pytest.approx(result.simulated_seconds)
    rebuilt = fed.replay(result.initial_params, tx, records)
    assert_trees_identical((result.params, result.state), rebuilt)


@pytest.mark.thorough
def test_rounds_to_which_nobody_comes_change_nothing_and_are_no_divergence():
    _, result = run(0.0, 15)
    assert (result.rounds, result.diverged_at) == (15, None)
    assert result.traffic["bytes_up"] == result.traffic["bytes_down"] == result.forward_passes == 0
    assert_trees_identical(result.params, result.initial_params)


def _odd_rounds(key, traits_key, clients, round_number):
    return (clients + round_number) % 2 == 1


def test_a_function_is_an_availability(tmp_path):
    population, config = digits_population(), fed.SimulationConfig(rounds=4, cohort=6, eval_every=2)

    def run(rule, rounds=4, resume=False):
        return fed.Simulation(
            linear_task(),
            hiso_jax.decomfl(0.1),
            population,
            dataclasses.replace(config, rounds=rounds),
            participation=fed.Participation(rule),
            storage=fed.Storage(tmp_path, resume=resume),
        ).run()

    records = run(_odd_rounds).records
    came = np.asarray(records.attendance) != ABSENT
    np.testing.assert_array_equal(came, (np.asarray(records.cohort) + np.arange(4)[:, None]) % 2 == 1)
    assert run(_odd_rounds, rounds=6, resume=True).rounds == 6
    # The function is part of the run.
    with pytest.raises(ValueError, match="availability"):
        run(lambda key, traits_key, clients, number: clients % 3 == 1, rounds=8, resume=True)


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (0.5, r"availability must be a rule like fed.Bernoulli\(0.8\), or a function\(key"),
        (fed.Bernoulli, r"availability must be a rule like"),
        (lambda number: True, r"availability must be a function\(key, .* takes 1 positional argument but 4"),
        (lambda *given: 0.5, "for 3 clients it returns float"),
        (lambda key, traits, clients, number: jnp.ones(2, bool), r"for 3 clients it returns bool of shape \(2,\)"),
        (lambda key, traits, clients, number: clients > 1 if number > 1 else clients > 2, "which JAX can compile"),
    ],
)
def test_what_is_no_availability_is_refused(rule, sentence):
    with pytest.raises(hiso_jax.ParameterError, match=sentence):
        fed.Participation(rule)
