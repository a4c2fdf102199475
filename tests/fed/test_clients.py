"""Clients by a column of the data, metrics of each client, a part that is trained, and deltas from Python."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hiso_jax
from hiso_jax import fed, tasks
from tests.cli.test_cli import call
from tests.fed.problems import digits_population, linear_task


@given(st.lists(st.sampled_from(["ann", "bo", "cy", "dee"]), min_size=1, max_size=40))
def test_every_example_belongs_to_whom_the_column_names(owners):
    population, names = fed.by_column(owners)
    population.check(len(owners))
    assert names == sorted(set(owners))
    for number, name in enumerate(names):
        own = population.indices[population.offsets[number] : population.offsets[number + 1]]
        assert sorted(own) == [place for place, owner in enumerate(owners) if owner == name]


def test_a_column_that_names_nobody_is_refused():
    for owners in ([], [0.5, 1.5], [[1], [2]], ["ann", 1], [True, "ann"]):
        with pytest.raises(ValueError, match="owners must be one value for each example, all integers or all text"):
            fed.by_column(owners)


@pytest.mark.thorough
def test_metrics_by_client_are_means_over_its_own_examples():
    task, population = linear_task(), digits_population()
    params = task.init(jax.random.key(0))
    found = fed.client_metrics(task, params, population)
    assert set(found) == {"loss", "accuracy"}
    for client in (0, 5, 11):
        own = population.indices[population.offsets[client] : population.offsets[client + 1]]
        batch = jax.tree.map(lambda array, own=own: array[own], task.train)
        for name, values in task.metrics(params, batch).items():
            np.testing.assert_allclose(found[name][client], np.mean(values), rtol=1e-5)


@pytest.mark.thorough
def test_only_the_part_that_is_named_is_trained():
    whole = tasks.digits()
    task = tasks.train_only(whole, "output")
    config = fed.SimulationConfig(rounds=60, cohort=5, eval_every=30)
    result = fed.Simulation(task, hiso_jax.decomfl(0.03), digits_population(), config).run()
    assert list(result.params) == ["output"]
    assert result.metrics[-1].metrics["loss"] < result.metrics[0].metrics["loss"] - 0.05
    together = {**task.frozen, **result.params}
    outputs = whole.metrics(together, whole.test)
    np.testing.assert_allclose(np.mean(outputs["loss"]), result.metrics[-1].metrics["loss"], rtol=1e-5)
    for names in ((), ("nothing",), ("hidden", "output")):
        with pytest.raises(ValueError, match="names must be some, and not all, of hidden, output"):
            tasks.train_only(whole, *names)


@pytest.mark.thorough
def test_a_delta_of_a_run_from_python_is_applied(capsys, tmp_path):
    from safetensors.numpy import load_file, save_file

    tx = hiso_jax.hiso(0.02)
    config = fed.SimulationConfig(rounds=12, cohort=4, perturbations=2, batch_size=8, eval_every=6)
    storage = fed.Storage(tmp_path / "run")
    result = fed.Simulation(linear_task(), tx, digits_population(), config, storage=storage).run()
    path, base, out = (tmp_path / f"{name}.safetensors" for name in ("delta", "base", "out"))
    fed.save_delta(fed.delta_of(fed.load(tmp_path / "run")), path)
    delta = fed.load_delta(path)
    assert fed.fingerprint(fed.apply_delta(delta, result.initial_params, tx)) == fed.fingerprint(result.params)
    with pytest.raises(ValueError, match="params must be those that the run began with"):
        fed.apply_delta(delta, result.params, tx)
    with pytest.raises(ValueError, match="tx must be the run's optimizer"):
        fed.apply_delta(delta, result.initial_params, hiso_jax.hiso(0.03))
    assert fed.apply_delta(delta, result.initial_params, hiso_jax.hiso(0.03), accept_difference=True)
    # The command line does the same with the file that holds the optimizer.
    (tmp_path / "mine.py").write_text("import hiso_jax\n\ntx = hiso_jax.hiso(0.02)\n")
    save_file({name: np.asarray(leaf) for name, leaf in result.initial_params.items()}, base)
    mine = ["--algorithm", f"{tmp_path / 'mine.py'}:tx"]
    code, _, errors = call(capsys, "apply", path, "--out", out, *mine)
    assert (code, out.exists()) == (2, False)
    assert "--base must be given: the run was made from Python" in errors
    code, text, errors = call(capsys, "apply", path, "--base", base, "--out", out, *mine)
    assert (code, errors) == (0, "")
    assert fed.fingerprint(result.params) in text
    np.testing.assert_array_equal(load_file(out)["weight"], result.params["weight"])


@pytest.mark.thorough
def test_evaluations_go_to_tensorboard(capsys, tmp_path):
    options = ["--rounds", "6", "--clients", "20", "--cohort", "4", "--eval-every", "3"]
    code, _, errors = call(capsys, "run", *options, "--log", "tensorboard", "--out", tmp_path / "run")
    assert (code, errors) == (0, "")
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    content = events.read_bytes()
    assert all(name in content for name in (b"test/accuracy", b"train/loss", b"bytes/up"))
