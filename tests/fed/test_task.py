"""The members that the federation needs of a task, and its defaults for the other members."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax
from hiso_jax import experiment, fed, tasks
from tests.cli.test_cli import SMALL, call
from tests.fed.problems import digits_population, linear_task
from tests.marks import slow


@dataclasses.dataclass(frozen=True)
class Bare:
    """A task of five members: it has no name, no metric that counts, no target, and no way to hold out examples."""

    train: dict
    test: dict

    def init(self, key):
        return linear_task().init(key)

    def loss(self, params, batch):
        return linear_task().loss(params, batch)

    def metrics(self, params, batch):
        return {"error": 1 - linear_task().metrics(params, batch)["accuracy"], "loss": self.loss(params, batch)}


def bare():
    return Bare(linear_task().train, linear_task().test)


def test_without_a_metric_of_its_own_the_loss_counts_and_lower_is_better(caplog):
    assert fed.metric_of(bare(), ["error", "loss"]) == fed.Metric("loss", higher_is_better=False)
    assert fed.metric_of(bare(), ["error"]) == fed.Metric("error")
    assert fed.metric_of(bare(), ["quality", "other"]) == fed.Metric("quality")
    assert "does not say by its metric which of quality, other counts; quality is taken to" in caplog.text
    assert fed.metric_of(linear_task(), ["loss", "accuracy"]) == fed.Metric("accuracy")
    with pytest.raises(ValueError, match="metric must be one of the task's metrics, loss, error; got accuracy"):
        fed.metric_of(linear_task(), ["loss", "error"])


@pytest.mark.thorough
def test_a_sweep_of_it_ranks_by_the_loss():
    config = fed.SimulationConfig(rounds=40, cohort=5, batch_size=8, eval_every=10)
    grid = fed.Grid([1e-4, 0.02, 1e6])
    result = fed.sweep(bare(), hiso_jax.decomfl, [digits_population()], config, grid)
    assert result.metric.name == "loss"
    assert result.final()[0, 0, 2] == np.inf
    best = result.best(None)
    assert best.learning_rate == 0.02
    # A loss is reached from above.
    target = float(result.final()[0, 0, 1]) + 0.05
    assert np.isfinite(result.rounds_to(target)[0, 0, 1])
    assert not np.isfinite(result.rounds_to(target)[0, 0, 0])


@pytest.mark.parametrize("task", [linear_task(), bare()])
def test_held_out_of_a_part_of_a_model_it_stays_that_part(task):
    part = fed.hold_out(tasks.train_only(task, "bias"), 100)
    assert list(part.init(jax.random.key(0))) == ["bias"]
    assert len(part.test["label"]) == 100
    again = copy.deepcopy(part)
    assert list(again.init(jax.random.key(0))) == ["bias"]


def test_examples_are_held_out_of_any_task():
    held = fed.hold_out(bare(), 100, seed=3)
    assert len(held.train["label"]) == 1337
    assert len(held.test["label"]) == 100
    whole = np.concatenate([held.train["input"], held.test["input"]]).reshape(1437, -1)
    np.testing.assert_array_equal(
        np.sort(whole.sum(1)), np.sort(np.asarray(bare().train["input"]).reshape(1437, -1).sum(1))
    )
    np.testing.assert_array_equal(held.loss(held.init(jax.random.key(0)), held.test).shape, (100,))
    with pytest.raises(ValueError, match="examples must be at least 1 and below 1437, got 1437"):
        fed.hold_out(bare(), 1437)


@pytest.mark.thorough
@pytest.mark.parametrize("command", ["run", *(slow(name) for name in ("sweep", "compare"))])
def test_it_goes_through_every_command(capsys, tmp_path, monkeypatch, command):
    monkeypatch.setattr(f"hiso_jax.cli.{command}.load_task", lambda options, console: bare())
    options = ["--learning-rate", "0.02"] if command == "run" else ["--learning-rate", "0.01,0.02"]
    code, text, errors = call(capsys, command, *SMALL, *options, "--out", tmp_path / "out")
    assert (code, errors) == (0, "")
    assert "loss" in text
    assert "accuracy" not in text
    if command == "run":
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary["metric"] == "loss"
        assert summary["loss"] < summary["initial_loss"]
        assert summary["target"] is None
        assert (tmp_path / "out" / "curves.png").exists()
    assert experiment.target_of(type("Options", (), {"target": None}), bare()) is None


class Watcher(fed.Callback):
    """A callback that has a metric of its own and ends the run."""

    def __init__(self):
        self.seen, self.ended = [], None

    def begin(self, session):
        self.seen.append(("begin", session.round))

    def end(self, session, result):
        self.ended = result

    def metrics(self, session):
        return {"size": float(optax_norm(session.params))}

    def after(self, session, evaluation):
        self.seen.append(session.round)
        if evaluation and evaluation.metrics["size"] > 0 and session.round >= 6:
            session.stop()


def optax_norm(tree):
    return jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(tree)))


@pytest.mark.thorough
def test_callbacks_see_the_session_add_metrics_and_may_stop_the_run(tmp_path):
    watcher = Watcher()
    config = fed.SimulationConfig(rounds=30, cohort=4, batch_size=8, eval_every=3, rounds_per_dispatch=1)
    result = fed.Simulation(
        linear_task(),
        hiso_jax.hiso(0.02),
        digits_population(),
        config,
        storage=fed.Storage(tmp_path / "run"),
        callbacks=[watcher],
    ).run()
    assert (result.rounds, result.interrupted) == (6, True)
    assert watcher.seen == [("begin", 0), *range(7)]
    assert watcher.ended is result
    np.testing.assert_allclose(result.metrics[-1].metrics["size"], float(optax_norm(result.params)), rtol=1e-6)
    kept = fed.load(tmp_path / "run", unfinished=True)
    assert [row.metrics["size"] for row in kept.evaluations] == [row.metrics["size"] for row in result.metrics]
