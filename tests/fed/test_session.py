"""A session whose dispatch comes from outside: a server that receives messages and simulates no clients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax
from hiso_jax import algorithms, fed
from hiso_jax.checks import ParameterError
from hiso_jax.fed import round as rounds
from hiso_jax.fed.keys import channel_key, round_key
from hiso_jax.fed.measure import Cohort, Keys
from hiso_jax.fed.run import monitor, programs
from hiso_jax.fed.run.state import RoundLog, RunState
from tests.fed.problems import assert_trees_identical, digits_population, linear_task
from tests.marks import thorough

LENGTH = 4


def simulation(algorithm):
    config = fed.SimulationConfig(
        rounds=10, cohort=4, perturbations=4, batch_size=8, eval_every=5, rounds_per_dispatch=LENGTH
    )
    return fed.Simulation(linear_task(), algorithm, digits_population(), config)


def from_messages(prepared, records):
    """A dispatch that settles the recorded messages of a run, as a server settles the messages that it receives."""
    settle = jax.jit(rounds.server_settle(prepared.algorithm, prepared.estimator, prepared.settings))

    def dispatch(carry, begin, end, inputs):
        logs = []
        for number in range(int(begin), int(end)):
            clients, at = jnp.asarray(records.cohort[number]), jnp.int32(number)
            messages = jax.tree.map(lambda column, n=number: jnp.asarray(column[n]), records.scalars)
            valid = jnp.asarray(records.valid[number])
            # The ledger holds the mean of the four losses, and the mean of four times that mean has the same bits.
            losses = jnp.full(len(clients), records.loss[number])
            keys = Keys(round_key(inputs.seed_key, at), channel_key(inputs.seed_key, at), at)
            cohort = Cohort(clients, valid.astype(jnp.float32), clients)
            server, record = settle(carry.server, cohort, keys, rounds.Arrived(messages, valid, losses))
            watched = monitor.watch(carry.monitor, at, record, valid, server.params, server.state)
            last = carry.synced_to[clients]
            logs.append(RoundLog(clients, jnp.asarray(records.attendance[number]), last, jnp.float32(0), record))
            carry = RunState(server, watched, carry.synced_to.at[clients].set(at))
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *logs)

    return dispatch


@pytest.mark.parametrize("name", [thorough("hiso"), "mosaic"])
def test_a_server_with_the_messages_makes_the_same_run(monkeypatch, name):
    algorithm = algorithms.load(name).build(0.01, {})
    expected = simulation(algorithm).run()
    assert expected.records.valid.all()

    prepared, compiled = simulation(algorithm)._prepared, []
    monkeypatch.setattr(programs, "ThreadPoolExecutor", compiled.append)
    with fed.Session.begin(prepared, dispatch=from_messages(prepared, expected.records)) as session:
        result = session.run()
    assert not compiled, "the simulated dispatch was compiled, too"
    assert_trees_identical(result.params, expected.params)
    assert_trees_identical(result.state, expected.state)
    assert_trees_identical(result.records.aggregate, expected.records.aggregate)
    assert [row.metrics for row in result.metrics] == [row.metrics for row in expected.metrics]
    assert [row.train_loss for row in result.metrics[1:]] == [row.train_loss for row in expected.metrics[1:]]
    assert result.traffic == expected.traffic


def test_a_dispatch_from_outside_replaces_the_simulated_one():
    """A session takes the rounds that its dispatch returns: with other messages it is another run."""
    algorithm = fed.Algorithm(hiso_jax.hiso(0.01))
    expected = simulation(algorithm).run()
    altered = expected.records._replace(scalars=-expected.records.scalars)
    prepared = simulation(algorithm)._prepared
    with fed.Session.begin(prepared, dispatch=from_messages(prepared, altered)) as session:
        result = session.run()
    np.testing.assert_array_equal(result.records.aggregate[0], -expected.records.aggregate[0])


class WithMetrics(fed.Callback):
    def __init__(self, function):
        self.function = function

    def metrics(self, session):
        return self.function(session)


def test_metrics_of_callbacks_are_kept_as_numbers(tmp_path):
    def metrics(session):
        return {"extra": jnp.abs(session.params["bias"]).max(), "rounds": np.int64(session.round)}

    config = fed.SimulationConfig(rounds=4, cohort=4, perturbations=2, batch_size=8, eval_every=2)

    def simulation(metrics, resume=False):
        storage = fed.Storage(tmp_path / "run", {}, resume=resume)
        callbacks = [WithMetrics(metrics)]
        return fed.Simulation(
            linear_task(), algorithms.decomfl(0.1), digits_population(), config, storage=storage, callbacks=callbacks
        )

    simulation(metrics).run()
    rows = simulation(metrics, resume=True).run().metrics
    assert [row.metrics["rounds"] for row in rows] == [0, 2, 4]
    assert rows[-1].metrics["extra"] > 0
    with pytest.raises(ParameterError, match="callbacks must return numbers as metrics; extra is 'much'"):
        fed.Simulation(
            linear_task(), algorithms.decomfl(0.1), digits_population(), config,
            callbacks=[WithMetrics(lambda session: {"extra": "much"})],
        ).run()  # fmt: skip


def test_functions_and_one_callback_alone_are_called(capsys):
    config = fed.SimulationConfig(rounds=4, cohort=2, eval_every=2)
    seen = []

    class Alone(fed.Callback):
        def end(self, session, result):
            seen.append(result.rounds)

    def run(callbacks):
        return fed.Simulation(
            linear_task(), hiso_jax.decomfl(0.1), digits_population(), config, callbacks=callbacks
        ).run()

    run(Alone())
    assert seen == [4]
    run(print)
    run([print, Alone()])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[1].startswith("Session(round 2 of 4) Evaluation(round=2")
