"""Methods whose clients take their own training steps: compared with plain loops, on meshes, stored and resumed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hiso_jax import algorithms, channels, fed
from tests.callbacks import Dispatches, StopAt
from tests.fed.problems import assert_trees_identical, digits_population, linear_task
from tests.marks import slow

SETTINGS = {"rounds": 9, "cohort": 5, "batch_size": 8, "eval_every": 3, "local_steps": 2, "rounds_per_dispatch": 1}


def run(algorithm, storage=None, callbacks=(), **settings):
    config = fed.SimulationConfig(**(SETTINGS | settings))
    return fed.Simulation(
        linear_task(), algorithm, digits_population(), config, storage=storage, callbacks=callbacks
    ).run()


def loss(params, batch):
    return (batch["x"] @ params["w"] - batch["y"]) ** 2 + params["b"] ** 2


def problem(clients=4, steps=3):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": jax.random.normal(keys[0], (5,)), "b": jnp.float64(0.3)}
    batches = {
        "x": jax.random.normal(keys[1], (clients, steps, 6, 5)),
        "y": jax.random.normal(keys[2], (clients, steps, 6)),
    }
    return jax.tree.map(lambda x: x.astype(jnp.float64), (params, batches))


def one_round(algorithm, params, batches, weights, **settings):
    round_ = fed.make_round(loss, algorithm, local_steps=3, num_perturbations=2, mu=1e-4, **settings)
    state = algorithm.tx.init(params)
    return jax.jit(round_)(params, state, batches, jnp.asarray(weights, jnp.float64), jax.random.key(1))


CASES = [(None, 0.0), (3, 0.5)]
MORE_CASES = [(1, 0.0), (3, 0.0), (None, 0.5), (1, 0.5)]


@pytest.mark.parametrize(("chunk", "proximal"), [*CASES, *(slow(*case) for case in MORE_CASES)])
def test_fed_avg_is_the_loop_of_its_paper(x64, chunk, proximal):
    rate, weights = 0.05, np.array([1.0, 2.0, 0.0, 3.0])
    params, batches = problem()
    algorithm = algorithms.fed_prox(rate, proximal=proximal) if proximal else algorithms.fed_avg(rate)
    execution = fed.ExecutionSettings(client_chunk=chunk)
    after, _, record = one_round(algorithm, params, batches, weights, execution=execution)

    x, y, w0, b0 = *(np.asarray(batches[name]) for name in "xy"), np.asarray(params["w"]), float(params["b"])
    ends, losses = [], []
    for client in range(4):
        w, b = w0.copy(), b0
        losses.append(((x[client, 0] @ w - y[client, 0]) ** 2).mean() + b**2)
        for k in range(3):
            residual = x[client, k] @ w - y[client, k]
            gradient = 2 * x[client, k].T @ residual / 6
            w, b = w - rate * (gradient + proximal * (w - w0)), b - rate * (2 * b + proximal * (b - b0))
        ends.append((w, b))
    share = weights / weights.sum()
    np.testing.assert_allclose(after["w"], sum(s * w for s, (w, _) in zip(share, ends, strict=True)), rtol=1e-10)
    np.testing.assert_allclose(after["b"], sum(s * b for s, (_, b) in zip(share, ends, strict=True)), rtol=1e-10)
    assert record.valid.tolist() == [True, True, False, True]
    np.testing.assert_allclose(record.loss, np.mean([losses[i] for i in (0, 1, 3)]), rtol=1e-10)
    assert record.scalars is None
    assert record.aggregate is None


def test_a_client_with_a_non_finite_difference_is_left_out(x64):
    params, batches = problem()
    poisoned = {**batches, "y": batches["y"].at[2, 1, 0].set(np.nan)}
    after, _, record = one_round(algorithms.fed_avg(0.05), params, poisoned, np.ones(4))
    without, _, _ = one_round(algorithms.fed_avg(0.05), params, batches, [1.0, 1.0, 0.0, 1.0])
    assert record.valid.tolist() == [True, True, False, True]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), after, without)


@pytest.mark.thorough
def test_differences_may_be_combined_by_a_median(x64):
    params, batches = problem(3)
    algorithm = fed.Algorithm(optax.sgd(1.0), algorithms.fed_avg(0.05).measure, combine=channels.median())
    after, _, _ = one_round(algorithm, params, batches, np.ones(3))
    each = [one_round(algorithms.fed_avg(0.05), params, batches, np.eye(3)[i])[0]["w"] for i in range(3)]
    np.testing.assert_allclose(after["w"], np.median(each, 0), rtol=1e-10)


@pytest.mark.parametrize("name", ["fed_adam", *(slow(name) for name in ("fed_yogi", "fed_adagrad"))])
def test_adaptive_servers_move_by_their_rate_at_first(x64, name):
    """In the first round Adam, Yogi and Adagrad all divide a change by about its own size."""
    params, batches = problem()
    algorithm = algorithms.FACTORIES[name](0.05, server_learning_rate=0.01, adaptivity=1e-9)
    after, _, _ = one_round(algorithm, params, batches, np.ones(4))
    plain, _, _ = one_round(algorithms.fed_avg(0.05), params, batches, np.ones(4))
    moved, wanted = after["w"] - params["w"], plain["w"] - params["w"]
    np.testing.assert_allclose(moved, 0.01 * np.sign(wanted), rtol=0.2)


@pytest.mark.thorough
def test_fed_zo_follows_the_gradient_along_directions_of_each_clients_own(x64):
    """The estimate is unbiased: with many clients on the same data it is close to FedAvg with one local step."""
    params, batches = problem(1, 1)
    many = jax.tree.map(lambda a: jnp.repeat(a, 4000, 0), batches)
    settings = {"local_steps": 1, "num_perturbations": 1, "mu": 1e-6}
    moved = []
    for algorithm in (algorithms.fed_zo(0.01), algorithms.fed_avg(0.01)):
        round_ = fed.make_round(loss, algorithm, **settings)
        after, _, _ = jax.jit(round_)(params, algorithm.tx.init(params), many, jnp.ones(4000), jax.random.key(1))
        moved.append(np.append(after["w"] - params["w"], after["b"] - params["b"]))
    assert np.linalg.norm(moved[0] - moved[1]) < 0.1 * np.linalg.norm(moved[1])


def test_bytes_and_passes_are_those_of_vectors_and_gradients():
    result = run(algorithms.fed_avg(0.1))
    size = 4 * (64 * 10 + 10)
    assert result.traffic["bytes_up"] == 9 * 5 * (8 + size)
    assert result.forward_passes == 9 * 5 * 2 * 3
    assert algorithms.fed_zo(0.01).measure.passes(2, 4) == 2 * 5
    assert result.metrics[-1].metrics["accuracy"] > result.metrics[0].metrics["accuracy"] + 0.2


@pytest.mark.thorough
def test_the_rate_may_be_a_schedule_over_rounds():
    three, six = (run(algorithms.fed_avg(optax.linear_schedule(0.1, 0.0, 3)), rounds=rounds) for rounds in (3, 6))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), three.params, six.params)


@pytest.mark.thorough
def test_a_run_that_was_stopped_goes_on_from_its_snapshot(tmp_path):
    """A replay cannot rebuild its rounds: those after the newest snapshot are cut from the ledger and run again."""
    algorithm = algorithms.fed_adam(0.1)
    whole = run(algorithm)

    def killed(session, evaluation):
        if session.round == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(algorithm, fed.Storage(tmp_path / "run"), [fed.Callback(killed)])
    ledger = fed.load(tmp_path / "run", unfinished=True)
    assert len(ledger.rows) == 8
    assert ledger.records.scalars is None
    assert sorted(int(path.name) for path in (tmp_path / "run" / "snapshots").iterdir()) == [3, 6]
    resumed = run(algorithm, fed.Storage(tmp_path / "run", resume=True))
    assert_trees_identical((resumed.params, resumed.state), (whole.params, whole.state))
    assert_trees_identical(fed.load(tmp_path / "run").records[1:], whole.records[1:])
    assert [row.round for row in fed.load(tmp_path / "run").evaluations] == [0, 3, 6, 9]
    again = run(algorithm, fed.Storage(tmp_path / "run", resume=True))
    assert_trees_identical((again.params, again.state), (whole.params, whole.state))


def test_a_damaged_snapshot_is_passed_over(tmp_path):
    """The snapshot before it is intact: the run resumes from there, and its ledger is cut back to that round."""
    algorithm, folder = algorithms.fed_avg(0.1), tmp_path / "run"
    stopped = run(algorithm, fed.Storage(folder), [StopAt(6)])
    assert (stopped.rounds, stopped.interrupted) == (6, True)

    def damage(rounds):
        for path in (folder / "snapshots" / str(rounds) / "arrays").rglob("d/*"):
            path.write_bytes(bytes(path.stat().st_size))

    damage(6)
    dispatches = Dispatches()
    resumed = run(algorithm, fed.Storage(folder, resume=True), [dispatches])
    assert dispatches.begun == 3
    whole = run(algorithm)
    assert_trees_identical(resumed.params, whole.params)
    assert_trees_identical(fed.load(folder).records[1:], whole.records[1:])


def test_a_run_killed_before_its_first_snapshot_begins_again(tmp_path):
    def killed(session, evaluation):
        if session.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(algorithms.fed_avg(0.1), fed.Storage(tmp_path / "run"), [fed.Callback(killed)])
    assert not (tmp_path / "run" / "snapshots").exists()
    resumed = run(algorithms.fed_avg(0.1), fed.Storage(tmp_path / "run", resume=True))
    assert_trees_identical(resumed.params, run(algorithms.fed_avg(0.1)).params)


def test_what_needs_scalars_refuses_in_one_sentence():
    result = run(algorithms.fed_avg(0.1), rounds=3)
    with pytest.raises(ValueError, match="a run of a method without scalars cannot be rebuilt from its records"):
        fed.replay(result.initial_params, algorithms.fed_avg(0.1), result.records)


@pytest.mark.thorough
def test_a_sweep_tunes_it():
    config = fed.SimulationConfig(**(SETTINGS | {"rounds": 30, "eval_every": 10}))
    result = fed.sweep(linear_task(), algorithms.fed_avg, [digits_population()], config, fed.Grid([1e-4, 0.1]))
    assert result.best(None).learning_rate == 0.1
