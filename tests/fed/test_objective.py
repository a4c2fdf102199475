"""Objectives with steps: what clients measure is the accuracy itself, or a reward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax
from hiso_jax import fed
from hiso_jax.checks import ParameterError
from hiso_jax.cli.main import main as command
from tests.fed.problems import assert_trees_identical, digits_population, linear_task


def run(task, algorithm=None, *, mu=0.3, rounds=30, **options):
    config = fed.SimulationConfig(
        rounds=rounds, cohort=6, batch_size=32, perturbations=16, eval_every=rounds, mu=mu, **options
    )
    algorithm = hiso_jax.decomfl(1.0) if algorithm is None else algorithm
    return fed.Simulation(task, algorithm, digits_population(), config).run()


def ended(*words):
    """The exit code of a command."""
    with pytest.raises(SystemExit) as found:
        command(list(words))
    return found.value.code


@pytest.fixture(scope="module")
def accuracy():
    return fed.maximise(linear_task(), "accuracy")


def test_a_loss_is_the_negative_of_the_value(accuracy):
    task, params = linear_task(), linear_task().init(jax.random.key(0))
    batch = jax.tree.map(lambda a: jnp.asarray(a[:9]), task.train)
    wanted = -np.asarray(task.metrics(params, batch)["accuracy"], np.float32)
    np.testing.assert_array_equal(accuracy.loss(params, batch), wanted)
    assert set(wanted.tolist()) <= {0.0, -1.0}
    assert accuracy.metric == task.metric
    assert accuracy.metrics(params, batch).keys() == task.metrics(params, batch).keys()


def test_training_on_accuracy_raises_it_and_replays(accuracy):
    result = run(accuracy)
    before, after = (row.metrics["accuracy"] for row in (result.metrics[0], result.metrics[-1]))
    assert after > before + 0.2
    # The training loss is the negative accuracy of the batches.
    assert -1 <= result.metrics[-1].train_loss <= 0
    replayed, _ = fed.replay(result.initial_params, hiso_jax.decomfl(1.0), result.records)
    assert_trees_identical(replayed, result.params)


def test_the_share_of_zero_scalars_is_counted(accuracy):
    fine, coarse = run(accuracy, mu=1e-3, rounds=6), run(accuracy, mu=0.3, rounds=6)
    for result in (fine, coarse):
        scalars = result.records.scalars[result.records.valid]
        assert result.zeros == pytest.approx((scalars == 0).mean())
    assert fine.zeros > 0.9 > coarse.zeros
    assert any("mu is too small for this objective" in sentence for sentence in fine.health_warnings)
    assert not any("mu is too small" in sentence for sentence in coarse.health_warnings)


@pytest.mark.thorough
def test_zeros_are_counted_of_own_directions_and_hardly_ever_of_a_loss(accuracy):
    assert run(accuracy, hiso_jax.mosaic(0.1), mu=1e-3, rounds=3).zeros > 0.9
    assert run(linear_task(), mu=1e-3, rounds=3).zeros == 0


@pytest.mark.parametrize("algorithm", [hiso_jax.local_mosaic(0.1), hiso_jax.fed_avg(0.1)])
def test_methods_whose_clients_take_gradients_refuse_it(accuracy, algorithm):
    with pytest.raises(ParameterError, match="objective must be loss for a method whose clients take gradients"):
        run(accuracy, algorithm)


def test_a_value_of_one_s_own_and_what_is_none():
    task = linear_task()
    reward = fed.maximise(
        task, lambda metrics, batch: metrics["accuracy"] - 0.1 * jnp.abs(batch["input"]).mean((1, 2, 3))
    )
    assert np.isfinite(run(reward, rounds=2).metrics[-1].train_loss)
    with pytest.raises(ParameterError, match="one of the task's metrics, loss, accuracy; got f1"):
        fed.maximise(task, "f1")
    with pytest.raises(ParameterError, match="a number for each example"):
        fed.maximise(task, lambda metrics, batch: metrics["accuracy"].mean())
    with pytest.raises(ParameterError, match="objective"):
        fed.maximise(task, 3)


def test_a_part_of_the_examples_keeps_the_objective(accuracy):
    held = fed.hold_out(accuracy, 50)
    assert not held.is_differentiable
    assert len(held.test["label"]) == 50
    assert len(held.train["label"]) == len(accuracy.train["label"]) - 50


@pytest.mark.thorough
def test_the_command_and_python_take_the_same_objective(tmp_path, capsys):
    options = {"algorithm": "decomfl", "learning_rate": 1.0, "rounds": 4, "eval_every": 4, "perturbations": 3}
    own = hiso_jax.Experiment(objective="accuracy", **options)
    assert own.config.mu == 0.1
    assert hiso_jax.Experiment(objective="accuracy", mu=0.5, **options).config.mu == 0.5
    assert hiso_jax.Experiment(**options).config.mu == 1e-3
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert ended("run", *words, "--objective", "accuracy", "--out", str(tmp_path / "run")) == 0
    assert fed.load(tmp_path / "run").seal["params_sha256"] == fed.fingerprint(own.run().params)
    assert ended("replay", str(tmp_path / "run")) == 0
    capsys.readouterr()
    assert ended("run", *words, "--objective", "f1", "--out", str(tmp_path / "other")) == 2
    assert "--objective must be loss or one of the task's metrics, loss, accuracy; got f1" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_an_objective_of_one_s_own_file(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(
        "from hiso_jax.choices import defaults\n\n\n@defaults(mu=0.2)\n"
        "def reward(*, weight: float = 1.0):\n    '''A reward.\n\n    Args:\n      weight: its weight.\n    '''\n"
        "    return lambda metrics, batch: weight * metrics['accuracy']\n"
    )
    own = hiso_jax.Experiment(
        objective=f"{path}:reward", weight=2.0, algorithm="decomfl", learning_rate=0.5, rounds=2, eval_every=2
    )
    assert own.config.mu == 0.2
    result = own.run(tmp_path / "run")
    assert result.metrics[-1].train_loss < 0
    assert ended("run", "--resume", str(tmp_path / "run"), "--rounds", "4") == 2
    assert "--objective must be given again, as FILE:NAME" in capsys.readouterr().err
    words = ["--rounds", "4", "--objective", f"{path}:reward"]
    assert ended("run", "--resume", str(tmp_path / "run"), *words) == 0


@pytest.mark.parametrize(
    ("declared", "error"),
    [
        ("round=4", "mine declares a default of round, which is no option; did you mean rounds"),
        ("sampler='sign'", "a task may"),
    ],
)
def test_a_default_that_an_objective_cannot_declare(tmp_path, declared, error):
    path = tmp_path / "mine.py"
    path.write_text(
        f"from hiso_jax.choices import defaults\n\n\n@defaults({declared})\ndef mine():\n"
        "    return lambda metrics, batch: metrics['accuracy']\n"
    )
    with pytest.raises(ParameterError, match=error):
        hiso_jax.Experiment(objective=f"{path}:mine", algorithm="decomfl", learning_rate=0.5, rounds=2)
