"""The loop around the rounds."""

import dataclasses
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hiso_jax
from hiso_jax import fed, tasks
from hiso_jax.fed.run import describe
from hiso_jax.fed.run import interrupt as interrupts
from hiso_jax.fed.run import monitor as monitoring
from hiso_jax.fed.run import simulation as simulations
from hiso_jax.fed.run.programs import build_dispatch, costs_of, first_state
from hiso_jax.fed.run.progress_estimate import RoundTimes, expected_seconds
from tests.callbacks import Dispatches, StopAt
from tests.fed.problems import assert_trees_identical, digits_population, double_task, linear_task
from tests.marks import slow, thorough

SETTINGS = {"rounds": 30, "cohort": 4, "perturbations": 2, "batch_size": 8, "eval_every": 10}


def simulation(task=None, rate=0.02, callbacks=(), **settings):
    config = fed.SimulationConfig(**{**SETTINGS, **settings})
    return fed.Simulation(task or linear_task(), hiso_jax.hiso(rate), digits_population(), config, callbacks=callbacks)


def test_history_records_and_accounting():
    dispatches = Dispatches()
    result = simulation(callbacks=[dispatches], rounds=25, local_steps=2, local_learning_rate=0.02).run()
    assert [row.round for row in result.metrics] == [0, 10, 20, 25]
    assert result.metrics[-1].metrics["loss"] < result.metrics[0].metrics["loss"]
    assert [row.round for row in dispatches.evaluations] == [0, 10, 20, 25]
    assert result.records.scalars.shape == (25, 4, 2, 2)
    np.testing.assert_array_equal(result.records.round, np.arange(25))
    seed_key = jax.random.key(0)
    for r in (0, 24):
        np.testing.assert_array_equal(result.records.cohort[r], fed.sample_cohort(fed.cohort_key(seed_key, r), 12, 4))
    # A round costs C·K·(P + 1) passes.
    assert result.forward_passes == 25 * 4 * 2 * 3
    assert result.traffic["bytes_up"] == 25 * 4 * (8 + 16)
    assert result.traffic["bytes_paper_convention"] == 25 * 8 * 4
    assert not result.interrupted
    assert result.diverged_at is None


@pytest.mark.thorough
def test_central_differences_count_their_pairs():
    result = simulation(rounds=4, difference="central").run()
    assert result.forward_passes == 4 * 2 * 4 * 2


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    one, same, other = (simulation(seed=seed).run() for seed in (3, 3, 4))
    assert_trees_identical((one.params, one.state, one.records[1:]), (same.params, same.state, same.records[1:]))
    assert (one.records.cohort != other.records.cohort).any()
    assert (one.records.scalars != other.records.scalars).any()


@pytest.mark.slow
def test_it_runs_in_double_precision(x64):
    result = simulation(double_task(), rounds=3, rounds_per_dispatch=3).run()
    assert result.records.scalars.dtype == np.float64
    assert {leaf.dtype for leaf in jax.tree.leaves(result.params)} == {jnp.dtype(jnp.float64)}


def test_evaluation_counts_every_example_once():
    task = linear_task()
    params = task.init(jax.random.key(0))
    whole = {name: float(value.mean()) for name, value in task.metrics(params, task.test).items()}
    test = jax.tree.map(jnp.asarray, dict(task.test))
    assert len(test["label"]) == 360
    each = fed.devices.evaluation_bytes(task.metrics, params, test, 1)
    for chunk in (1, 7, 360, 512):
        values = jax.jit(fed.make_evaluate(task.metrics, budget=chunk * each))(params, test)
        for name, value in values.items():
            assert value.shape == (360,)
            np.testing.assert_allclose(value.mean(), whole[name], rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "target", "index"),
    [
        ([0.1, 0.9, 0.1, 0.8, 0.9, 0.9, 0.95], 0.8, 3),
        ([0.95, 0.8, 0.95], 0.9, 0),
        ([0.1, 0.95, 0.95], 0.9, None),
        ([], 0.5, None),
    ],
)
def test_a_target_must_hold_for_three_evaluations(values, target, index):
    assert fed.first_at_target(values, target) == index


@pytest.mark.parametrize("per_dispatch", [slow(None), 1, 4])
def test_a_rate_far_too_high_diverges_and_the_state_stays_as_it_was_then(per_dispatch):
    result = simulation(rate=1e6, rounds_per_dispatch=per_dispatch).run()
    assert result.diverged_at is not None
    assert result.rounds == result.diverged_at + 1 < 30
    assert len(result.records.round) == result.rounds
    rebuilt = fed.replay(result.initial_params, hiso_jax.hiso(1e6), result.records)
    assert_trees_identical((result.params, result.state), rebuilt)


def test_loss_above_its_ceiling_for_three_rounds_in_a_row_is_divergence():
    """All numbers here are finite; the ceiling is max(10 · 2, 2 + 10) = 20."""
    mask, params = jnp.ones(2, bool), jnp.ones(3)
    state = hiso_jax.hiso(0.1).init(params)
    monitor = monitoring.start()
    for number, loss in enumerate([2.0, 21.0, 21.0, 19.0, 21.0, 21.0, 21.0, 1.0]):
        record = fed.RoundRecord(jnp.zeros((2, 1, 1)), mask, jnp.zeros((1, 1)), jnp.float32(loss))
        monitor = monitoring.watch(monitor, jnp.int32(number), record, mask, params, state)
        assert int(monitor.diverged_at) == (6 if number >= 6 else monitoring.NEVER)


@pytest.mark.thorough
def test_ten_rounds_without_a_valid_client_are_divergence():
    base = linear_task()
    broken = dataclasses.replace(base, model_apply=lambda params, x: base.model_apply(params, x) * jnp.nan)
    result = simulation(broken).run()
    assert result.diverged_at == 9
    assert not result.records.valid.any()
    assert_trees_identical(result.params, result.initial_params)


def test_stop_ends_the_run_and_keeps_what_was_done():
    def stop(session, evaluation):
        if session.round >= 7:
            run.stop()

    run = simulation(callbacks=[fed.Callback(stop)], rounds_per_dispatch=1)
    result = run.run()
    assert result.interrupted
    assert result.rounds == 7
    assert result.metrics[-1].round == 7
    rebuilt = fed.replay(result.initial_params, hiso_jax.hiso(0.02), result.records)
    assert_trees_identical((result.params, result.state), rebuilt)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"cohort": 13}, "cohort must be at most the number of clients, 12, got 13"),
        ({"rounds": 0}, r"rounds must be at least 1, got 0"),
        ({"local_steps": 0}, "local_steps must be at least 1"),
        ({"perturbations": -1}, "perturbations must be at least 1, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"mu": 0.0}, "mu must be a positive finite number, got 0.0"),
        ({"mu": float("inf")}, "mu must be a positive finite number, got inf"),
        ({"difference": "sideways"}, "difference must be forward or central, got sideways"),
        ({"seed": -1}, "seed must be at least 0"),
        (
            {"local_learning_rate": float("nan")},
            "local_learning_rate must be a finite number ≥ 0 or a schedule over rounds, got nan",
        ),
        ({"local_steps": 2}, "local_learning_rate must be given for"),
        ({"rounds_per_dispatch": 0}, "rounds_per_dispatch must be at least 1"),
        ({"rounds": 6.5}, "rounds must be an integer, got 6.5"),
        ({"rounds": True}, "rounds must be an integer, got True"),
        ({"cohort": 4.0}, "cohort must be an integer, got 4.0"),
        ({"mu": np.float32("nan")}, "mu must be a positive finite number"),
        ({"mu": "1e-3"}, "mu must be a positive finite number, got '1e-3'"),
        ({"seed": 2**31}, r"seed must be below 2\^31"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        simulation(**settings)


def test_processes_of_unequal_memory_are_planned_alike(monkeypatch):
    """The memory of process 0 decides for all processes; otherwise their programs would differ."""
    monkeypatch.setattr(simulations, "agree", lambda mesh, *numbers: (7,))
    budgets = [each._prepared.settings.memory_budget for each in (simulation(), simulation(memory_budget=123))]
    assert budgets == [7 * 2**20, 123]


def test_a_population_of_other_data_is_refused():
    with pytest.raises(ValueError, match="population names example 4999; the task has 1437 training examples"):
        fed.Simulation(linear_task(), hiso_jax.hiso(0.1), fed.iid(5000, 10), fed.SimulationConfig(cohort=2))


@pytest.mark.thorough
def test_a_far_evaluation_does_not_lengthen_a_dispatch():
    """The time of idle steps does not shorten the next dispatch: after a few dispatches each holds many rounds."""
    dispatches = Dispatches()
    running = simulation(rounds=2_000_000, eval_every=2_000_000)
    running.callbacks = (dispatches, StopAt(300))
    result = running.run()
    assert result.interrupted
    steps = np.diff(dispatches.rounds)
    assert 16 <= steps.max() <= 128
    assert result.rounds < 600


@pytest.mark.parametrize("precision", ["default", "high", "highest"])
def test_products_are_made_in_the_precision_asked_for(precision):
    """Every product of the dispatch has the precision that was asked for; by default no product names one."""
    task, population = linear_task(), digits_population()
    config = fed.SimulationConfig(rounds=1, cohort=2, matmul_precision=precision)
    given = fed.RunSpec(task, jax.eval_shape(task.init, jax.random.key(0)), population, fed.Participation())
    run = describe(given, hiso_jax.hiso(0.01), config, fed.make_mesh(1), memory_budget=10**8)
    text = run.dispatch.lower().as_text()
    asked = {"default": "", "high": "precision = [HIGH, HIGH]", "highest": "precision = [HIGHEST, HIGHEST]"}[precision]
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all(asked in line and (asked or "HIGH" not in line) for line in products)


def test_a_precision_that_is_none_is_refused():
    with pytest.raises(ValueError, match="matmul_precision must be one of default, high, highest, got full"):
        fed.SimulationConfig(matmul_precision="full")


def test_how_long_a_run_takes_is_foretold_by_what_took_a_while():
    config = fed.SimulationConfig(rounds=100, cohort=10, batch_size=32, eval_every=50)
    prepared = types.SimpleNamespace(config=config, test={"label": np.zeros(1000)})
    # A round evaluates 10 x 32 examples six times, at 0.5 ms each; there are two evaluations of the model.
    assert expected_seconds(prepared, RoundTimes(None, 0.5, 6), 0) == pytest.approx(100 * 1920 * 0.0005 + 2 * 0.5)
    assert expected_seconds(prepared, RoundTimes(None, 0.01, 6), 0) is None
    assert expected_seconds(prepared, RoundTimes(0.002, 0.01, 6), 60) == pytest.approx(40 * 0.002 + 0.01)


def test_a_session_takes_its_dispatch_from_outside():
    """A server whose rounds are computed elsewhere stores, evaluates and reports them as its own."""
    run = simulation(rounds=6, eval_every=3)
    prepared, alone, bounds = run._prepared, run.run(), []
    server = first_state(prepared, alone.initial_params)[0].server
    costs = costs_of(prepared.algorithm, prepared.estimator, server, prepared.config)
    program = jax.jit(build_dispatch(prepared, costs))

    def elsewhere(carry, begin, end, inputs):
        bounds.append((int(begin), int(end)))
        return program(carry, begin, end, inputs)

    with fed.Session.begin(prepared, dispatch=elsewhere) as session:
        result = session.run()
    assert (bounds[0][0], bounds[-1][1]) == (0, 6)
    assert_trees_identical((result.params, result.records[1:]), (alone.params, alone.records[1:]))
    assert [row.round for row in result.metrics] == [0, 3, 6]


SMALL = {"rounds": 4, "cohort": 4, "perturbations": 2, "batch_size": 8, "eval_every": 2}


def test_a_result_and_populations_are_shown_in_lines_and_tables(tmp_path, caplog):
    """Also: a path is a storage, the pair of ``by_column`` is a population, and a divergence is no secret."""
    population = fed.by_column(np.arange(1437) % 12)
    config = fed.SimulationConfig(**SMALL)
    result = fed.Simulation(
        linear_task(), hiso_jax.decomfl(0.01), population, config, storage=str(tmp_path / "run")
    ).run()
    assert fed.load(tmp_path / "run").rows[-1]["round"] == 3
    text = repr(result)
    assert text.startswith("Result of 4 rounds\n  round 4: ")
    assert len(text.splitlines()) <= 10
    assert repr(population[0]) == "Population of 12 clients with 119 to 120 examples, 1,437 in all"
    virtual = fed.virtual(np.arange(1437) % 10, 5000, alpha=0.5)
    assert repr(virtual) == "VirtualPopulation of 5,000 clients that draw from 1,437 examples"
    table = result.to_pandas()
    assert table["round"].tolist() == [0, 2, 4]
    assert table["loss"].tolist() == [row.metrics["loss"] for row in result.metrics]
    diverged = fed.Simulation(linear_task(), hiso_jax.decomfl(1e9), population, config).run()
    assert diverged.health_warnings[0].startswith(f"diverged at round {diverged.diverged_at}: ")
    assert f"warning: {diverged.health_warnings[0]}" in repr(diverged)
    assert diverged.health_warnings[0] in caplog.text
    with pytest.raises(hiso_jax.ParameterError, match=r"population must be a population, .*, got a list"):
        fed.Simulation(linear_task(), hiso_jax.decomfl(0.01), [1, 2], config)


def test_the_first_interrupt_ends_a_run_and_keeps_what_was_done(monkeypatch):
    class Interrupt(fed.Callback):
        opened = closed = 0

        def open(self):
            self.opened += 1

        def close(self):
            self.closed += 1

        def after(self, session, evaluation):
            if session.round == 2:
                signal.raise_signal(signal.SIGINT)

    # A process that was started in the background may ignore the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before, interrupt = signal.getsignal(signal.SIGINT), Interrupt()
    monkeypatch.setattr(interrupts, "_interrupted_at", -interrupts.AGAIN_SECONDS)
    config = fed.SimulationConfig(**SMALL, rounds_per_dispatch=1)
    result = fed.Simulation(
        linear_task(), hiso_jax.decomfl(0.01), digits_population(), config, callbacks=[interrupt]
    ).run()
    assert (result.interrupted, result.rounds) == (True, 2)
    assert (interrupt.opened, interrupt.closed) == (1, 1)
    assert signal.getsignal(signal.SIGINT) is before
    # Soon after, in the next run of a loop, it ends the program.
    with pytest.raises(KeyboardInterrupt):
        fed.Simulation(linear_task(), hiso_jax.decomfl(0.01), digits_population(), config, callbacks=[interrupt]).run()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("algorithm", "task_name", "expected"),
    [
        thorough(hiso_jax.algorithms.decomfl(0.2), "mine", 0.2),
        thorough(hiso_jax.algorithms.local_mosaic(0.2), "mine", 0.1),
        (hiso_jax.algorithms.local_mosaic(0.2), "digits", 0.6),
    ],
)
def test_local_steps_have_a_rate_by_default(algorithm, task_name, expected):
    """It is that of the command line: the task's for projections, else the server's."""
    task = dataclasses.replace(tasks.digits(), name=task_name)
    population = fed.iid(len(task.train["label"]), 10)

    def run(rate):
        config = fed.SimulationConfig(
            rounds=2, cohort=2, eval_every=2, local_steps=2, perturbations=64, local_learning_rate=rate
        )
        return fed.Simulation(task, algorithm, population, config).run()

    assert_trees_identical(run(None).params, run(expected).params)


@pytest.mark.thorough
def test_a_schedule_is_also_the_default_of_local_steps():
    schedule = optax.exponential_decay(0.2, 1, 0.5)
    task = tasks.digits()
    population = fed.iid(len(task.train["label"]), 10)

    def run(**given):
        config = fed.SimulationConfig(rounds=2, cohort=2, eval_every=2, local_steps=2, **given)
        return fed.Simulation(task, hiso_jax.algorithms.decomfl(schedule), population, config).run()

    assert_trees_identical(run().params, run(local_learning_rate=schedule).params)


def test_the_rate_of_local_steps_is_asked_for_where_it_cannot_be_known():
    config = fed.SimulationConfig(rounds=2, cohort=2, local_steps=2)
    with pytest.raises(hiso_jax.ParameterError, match="local_learning_rate must be given for 2 local steps: the rate"):
        fed.Simulation(linear_task(), hiso_jax.decomfl(0.2), digits_population(), config)


def test_parameters_that_are_no_arrays_are_refused():
    params = {"w": jnp.zeros(3), "act": jax.nn.relu}
    task = dataclasses.replace(linear_task(), model_apply=lambda params, x: x.reshape(len(x), -1)[:, :10])
    object.__setattr__(task, "model_init", lambda key: params)
    with pytest.raises(hiso_jax.ParameterError, match=r"init must be a tree of arrays, got .* at \['act'\]"):
        fed.Simulation(task, hiso_jax.decomfl(0.2), digits_population(), fed.SimulationConfig(rounds=2, cohort=2))
    with pytest.raises(hiso_jax.ParameterError, match=r"params must be a tree of arrays, got a .* at \['act'\]"):
        hiso_jax.decomfl(0.2).init(params)
