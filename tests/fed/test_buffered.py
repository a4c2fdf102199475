"""Asynchronous rounds: the first answers count, along the directions of the rounds in which their visits began."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax
from hiso_jax import algorithms, channels, fed, zo
from hiso_jax.checks import ParameterError
from hiso_jax.fed.keys import presence_key, round_key, traits_key
from hiso_jax.fed.ledger.reading import _check_rows
from hiso_jax.fed.ledger.records import as_rows
from hiso_jax.fed.population import ABSENT, LATE, REPORTED, Work
from hiso_jax.fed.run import describe
from tests.fed.problems import assert_trees_identical, digits_population, double_task, linear_task
from tests.marks import thorough

CLIENTS, COHORT, BUFFER = 24, 8, 2
FLEET = fed.Fleet(fed.LogNormal(0.1, 1.5), fed.LogNormal(2.5e6, 0.5), fed.LogNormal(6e5, 0.5))
# One method with shared directions, one with a client's own, one that projects local steps.
METHODS = {
    "decomfl": lambda: hiso_jax.decomfl(0.05),
    "mosaic": lambda: hiso_jax.mosaic(0.2),
    "local_mosaic": lambda: hiso_jax.local_mosaic(0.2),
}


def simulation(method="decomfl", *, rounds=12, storage=None, participation=None, callbacks=(), **options):
    config = fed.SimulationConfig(
        rounds=rounds,
        eval_every=4,
        batch_size=4,
        perturbations=3,
        **{"cohort": COHORT, "buffer": BUFFER, **({"local_steps": 2} if method == "local_mosaic" else {}), **options},
    )
    return fed.Simulation(
        double_task() if jax.config.read("jax_enable_x64") else linear_task(),
        METHODS[method]() if isinstance(method, str) else method,
        digits_population(CLIENTS),
        config,
        participation=participation or fed.Participation(fleet=FLEET),
        storage=storage,
        callbacks=callbacks,
    )


def own_directions(head, key, place, params, perturbations, groups):
    """The directions of one visit, as its client makes them."""
    whole = head.grouped_directions(key, 0, params, groups=groups, num_perturbations=perturbations)
    return [whole.at(index).of(place % groups) for index in range(perturbations)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", ["decomfl", thorough("mosaic"), thorough("local_mosaic")])
def test_a_buffer_of_the_whole_cohort_is_a_synchronous_run(method):
    late, whole = simulation(method, rounds=3, buffer=COHORT).run(), simulation(method, rounds=3, buffer=None).run()
    for a, b in zip(jax.tree.leaves(late.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)
    assert late.staleness == {"mean": 0, "most": 0}
    assert whole.staleness is None
    assert late.simulated_seconds == pytest.approx(whole.simulated_seconds, rel=0.05)
    # Answers come in the order of their times.
    np.testing.assert_array_equal(np.sort(late.records.cohort), np.sort(whole.records.cohort))


@pytest.mark.parametrize("method", [thorough("decomfl"), "mosaic", thorough("local_mosaic")])
def test_its_rounds_replay_to_the_bit_and_as_a_delta(method, tmp_path):
    run = simulation(method, storage=tmp_path / "run")
    result = run.run()
    ledger = fed.load(tmp_path / "run")
    params, _ = fed.replay(result.initial_params, run.algorithm, ledger.records)
    assert_trees_identical(params, result.params)
    fed.save_delta(fed.delta_of(ledger), tmp_path / "delta.safetensors")
    delta = fed.load_delta(tmp_path / "delta.safetensors")
    assert_trees_identical(fed.apply_delta(delta, result.initial_params, run.algorithm), result.params)


def test_an_update_is_the_mean_of_discounted_visits_along_the_directions_of_their_rounds():
    """Against NumPy: every update from the scalars in the records and the directions of each visit's round."""
    run = simulation("decomfl", rounds=10, staleness_exponent=0.7)
    result = run.run()
    records, head = result.records, zo.zo_state(run.algorithm.optimizer.init(result.initial_params))
    age = records.round[:, None] - records.version
    assert age.max() > 1
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), result.initial_params)
    for row in range(10):
        delta = jax.tree.map(np.zeros_like, params)
        for visit in range(BUFFER):
            key = round_key(records.seed_key, int(records.version[row, visit]))
            directions = own_directions(head, key, int(records.place[row, visit]), result.initial_params, 3, 1)
            for scalar, z in zip(records.scalars[row, visit, 0], directions, strict=True):
                share = float(scalar) * (1 + int(age[row, visit])) ** -0.7 / (3 * BUFFER)
                delta = jax.tree.map(lambda d, u, s=share: d + s * np.asarray(u, np.float64), delta, z)
        params = jax.tree.map(lambda x, d: x - 0.05 * d, params, delta)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(result.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_visit_measures_at_the_parameters_of_its_round():
    """The scalars that come late are differences of the loss at x of their visit's round, not at the server's."""
    run = simulation("decomfl", rounds=10)
    result = run.run()
    records, task = result.records, linear_task()
    head = zo.zo_state(run.algorithm.optimizer.init(result.initial_params))
    row, visit = np.argwhere(records.round[:, None] - records.version >= 2)[-1]
    version, client = int(records.version[row, visit]), int(records.cohort[row, visit])
    at = result.initial_params
    if version:
        at, _ = fed.replay(at, run.algorithm, records.updates.between(0, version))
    places = digits_population(CLIENTS).sample(fed.data_key(records.seed_key, version), jnp.array([client]), (1, 4))
    batch = jax.tree.map(lambda a: jnp.asarray(a)[places[0, 0]], task.train)
    key = round_key(records.seed_key, version)
    found = [
        (task.loss(zo.perturb(at, z, 1e-3), batch).mean() - task.loss(at, batch).mean()) / 1e-3
        for z in own_directions(head, key, 0, at, 3, 1)
    ]
    np.testing.assert_allclose(records.scalars[row, visit, 0], found, rtol=0.02, atol=2e-3)


def test_the_clock_and_the_order_are_those_of_a_queue():
    """Against a queue in Python: who is invited, who answers in which round, and when."""
    # Bytes take no time here, so that a client's visits all take the same seconds.
    fleet = fed.Fleet(fed.LogNormal(0.1, 1.5), fed.LogNormal(1e15), fed.LogNormal(1e15))
    run = simulation(rounds=20, participation=fed.Participation(fleet=fleet))
    records = run.run().records
    work = Work(jnp.zeros(CLIENTS), 0.0, 4.0, 0.0)
    seconds = np.asarray(fleet.seconds(zo.fold_in(traits_key(records.seed_key), 1), jnp.arange(CLIENTS), work))
    now, at_work = 0.0, []
    for number in range(20):
        candidates = fed.sample_cohort(fed.cohort_key(records.seed_key, number), CLIENTS, COHORT).tolist()
        free = [client for client in candidates if client not in [visit[3] for visit in at_work]]
        invited = free[: COHORT if number == 0 else BUFFER]
        at_work += [(now + seconds[client], number, place, client) for place, client in enumerate(invited)]
        at_work.sort()
        ended, at_work = at_work[:BUFFER], at_work[BUFFER:]
        found = records.version[number], records.place[number], records.cohort[number]
        assert list(zip(*(column.tolist() for column in found), strict=True)) == [visit[1:] for visit in ended]
        assert records.seconds[number] == pytest.approx(ended[-1][0] - now, rel=1e-3, abs=1e-5)
        now = ended[-1][0]


def test_answers_older_than_the_most_are_late():
    whole, limited = simulation(rounds=20).run().records, simulation(rounds=20, max_staleness=2).run().records
    age = limited.round[:, None] - limited.version
    assert (whole.round[:, None] - whole.version).max() > 2
    np.testing.assert_array_equal(limited.attendance == LATE, age > 2)
    assert not limited.valid[age > 2].any()


def test_clients_that_do_not_come_free_their_place():
    there = fed.Participation(fed.Bernoulli(0.6), dropout=0.2, fleet=FLEET, deadline=2.0)
    result = simulation(rounds=20, participation=there).run()
    counted = result.attendance
    assert min(counted.values()) > 0
    assert sum(counted.values()) == 20 * BUFFER
    assert (result.records.valid == (result.records.attendance == REPORTED)).all()


@pytest.mark.parametrize("method", ["decomfl", thorough("mosaic"), thorough("local_mosaic")])
def test_a_stopped_run_goes_on_with_the_visits_at_work(method, tmp_path):
    whole = simulation(method, rounds=16, storage=tmp_path / "whole").run()

    def stop(session, evaluation):
        if session.round >= 6:
            session.stop()

    callbacks = (fed.Callback(stop),)
    simulation(method, rounds=16, storage=tmp_path / "run", callbacks=callbacks, rounds_per_dispatch=3).run()
    again = simulation(method, rounds=16, storage=fed.Storage(tmp_path / "run", resume=True)).run()
    assert_trees_identical(again.params, whole.params)
    assert again.traffic == whole.traffic
    assert again.staleness == whole.staleness
    first, second = fed.load(tmp_path / "whole").records, fed.load(tmp_path / "run").records
    assert_trees_identical(first._replace(seed_key=None), second._replace(seed_key=None))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("version", lambda rows: rows + 100, "visits begin in rounds that had not come"),
        ("version", lambda rows: rows - 100, "visits begin in rounds that had not come"),
        ("place", lambda rows: rows - 100, "visits begin in rounds that had not come"),
    ],
)
def test_a_ledger_whose_visits_cannot_be_is_refused(name, change, message, tmp_path):
    rows = as_rows(simulation(rounds=4).run().records)
    _check_rows(tmp_path, rows)
    rows[name] = change(rows[name])
    with pytest.raises(ValueError, match=message):
        _check_rows(tmp_path, rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": hiso_jax.hiso(0.1)}, "depend on past rounds"),
        ({"method": algorithms.adamezo(0.1)}, "depend on past rounds"),
        ({"method": algorithms.fed_avg(0.1)}, "messages are not scalars"),
        ({"method": channels.median().into(fed.Algorithm(hiso_jax.decomfl(0.1)))}, "compares"),
        ({"buffer": 3}, "must divide the cohort of 8 clients, got 3"),
        ({"buffer": None, "max_staleness": 3}, "would have no effect alone"),
        ({"staleness_exponent": -1.0}, "must be a finite number"),
        ({"participation": fed.Participation()}, "needs a fleet"),
    ],
)
def test_what_cannot_be_asynchronous_is_refused_in_a_sentence(change, message):
    with pytest.raises(ParameterError, match=message):
        simulation(**change)


@pytest.mark.thorough
def test_a_sweep_of_asynchronous_runs_is_those_runs():
    config, there = replace(simulation().config, rounds=8), fed.Participation(fleet=FLEET)
    grid = fed.Grid([0.02, 0.05])
    population = [digits_population(CLIENTS)]
    swept = fed.sweep(linear_task(), hiso_jax.decomfl, population, config, grid, participation=there)
    alone = [row.metrics["loss"] for row in simulation("decomfl", rounds=8).run().metrics]
    np.testing.assert_allclose(swept.metrics["loss"].reshape(2, -1)[1], alone, rtol=1e-3)


def test_the_memory_of_a_round_does_not_grow_with_the_population():
    """The round at which each client was last synced, int32 [N], is updated in place and never copied."""
    task, clients = linear_task(), 1_000_000
    config = fed.SimulationConfig(rounds=2, cohort=COHORT, buffer=BUFFER, batch_size=4)
    population = fed.virtual(np.zeros(8, np.int32), clients)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    given = fed.RunSpec(task, shapes, population, fed.Participation(fleet=FLEET))
    run = describe(given, hiso_jax.decomfl(0.05), config, fed.make_mesh(1), memory_budget=10**8)
    memory = run.dispatch.lower().compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 4 * clients
    assert memory.temp_size_in_bytes < clients


@pytest.mark.parametrize(
    ("method", "fleet", "error"),
    [(hiso_jax.decomfl, None, "buffer needs a fleet"), (hiso_jax.hiso, FLEET, "buffer must not be given for a method")],
)
def test_a_sweep_refuses_as_a_simulation_does(method, fleet, error):
    config = fed.SimulationConfig(rounds=2, cohort=COHORT, buffer=BUFFER, batch_size=4)
    there, population = fed.Participation(fleet=fleet), digits_population(CLIENTS)
    with pytest.raises(ParameterError, match=error):
        fed.sweep(linear_task(), method, [population], config, fed.Grid((0.01,), (0,)), participation=there)


def days(buffer):
    # A synchronous round takes seconds, and a few fast answers take hundredths.
    return fed.Diurnal(0.6, 2 / 3, 0.05 if buffer else 1.5, in_seconds=True)


def clocked(buffer, **given):
    there = fed.Participation(days(buffer), fleet=FLEET)
    return simulation("decomfl", **{"rounds": 12, "buffer": buffer, "participation": there, **given})


@pytest.mark.parametrize("buffer", [BUFFER, None])
def test_the_time_of_day_may_be_that_of_the_clock(buffer):
    """Against the rule itself, at the sum of the recorded seconds before the round in which a visit began."""
    day, records = days(buffer), clocked(buffer).run().records
    before = np.concatenate([[0], np.add.accumulate(records.seconds.astype(np.float32))[:-1]])
    # Days pass, and clients sleep.
    assert before[-1] > 3 * day.period
    assert 0.1 < (records.attendance == ABSENT).mean() < 0.8
    begun = np.broadcast_to(records.round[:, None], records.cohort.shape) if buffer is None else records.version
    for row, clients in enumerate(records.cohort):
        for place, client in enumerate(clients):
            number = int(begun[row, place])
            key = jax.random.fold_in(presence_key(records.seed_key, number), 0)
            traits = jax.random.fold_in(traits_key(records.seed_key), 0)
            is_there = bool(day(key, traits, jnp.array([client]), jnp.float32(before[number]))[0])
            assert is_there == (records.attendance[row, place] != ABSENT)


@pytest.mark.parametrize("buffer", [BUFFER, thorough(None)])
def test_a_run_that_reads_the_clock_goes_on_to_the_same_bits(buffer, tmp_path):
    whole = clocked(buffer).run()
    stop = fed.Callback(lambda session, _: session.stop() if session.round >= 7 else None)
    clocked(buffer, storage=tmp_path / "run", callbacks=[stop], rounds_per_dispatch=2).run()
    again = clocked(buffer, storage=fed.Storage(tmp_path / "run", resume=True)).run()
    assert_trees_identical(again.params, whole.params)
    np.testing.assert_array_equal(again.records.attendance, whole.records.attendance)


def test_a_clock_needs_a_fleet():
    with pytest.raises(ParameterError, match="without a fleet"):
        simulation(buffer=None, participation=fed.Participation(days(None)))
