"""Objectives of generated answers: sampling, rewards of text, and answers that evaluations show."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiso_jax import Experiment, fed, reports
from hiso_jax.checks import ParameterError
from hiso_jax.experiment import notes
from hiso_jax.models import lm
from hiso_jax.reports.directory import append_samples, cut_samples, read_samples
from hiso_jax.tasks.text import text_reward, text_task
from tests.fed.problems import assert_trees_identical
from tests.tasks.text.problems import data_folder, model_folder
from tests.tasks.text.test_chat import LONG, SHORT, with_template, write

KEY = jax.random.key(7)
WIDTH = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_template(model_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def pretrained(folder):
    loaded = lm.load(folder)
    return replace(loaded, params=jax.tree.map(jnp.asarray, loaded.params))


@pytest.fixture(scope="module")
def task(pretrained):
    return task_of(pretrained, temperature=1.0, samples=2)


def task_of(pretrained, **given):
    rows = [{"messages": messages} for messages in (SHORT, LONG)]
    return text_task(
        "chat", lm.tune(pretrained), pretrained, rows={"train": rows, "test": rows}, max_new_tokens=4, **given
    )


def first_tokens(pretrained, prompts, temperature, keys):
    mask = np.ones(prompts.shape, bool)
    run = jax.jit(
        lambda params: lm.sampled(
            pretrained.decoder,
            params,
            prompts,
            mask,
            temperature=temperature,
            keys=keys,
            max_new_tokens=3,
            stop_tokens=(-1,),
            pad_token=0,
        )
    )
    return np.asarray(run(pretrained.params))


def test_tokens_are_drawn_as_often_as_the_model_says(pretrained):
    prompt, count = np.array([[0, 7, 8, 4, 5]], np.int32), 4000
    tokens = first_tokens(pretrained, np.repeat(prompt, count, 0), 1.5, jax.random.split(KEY, count))
    hidden = pretrained.decoder.hidden(pretrained.params, prompt, last=1)[:, 0]
    expected = np.asarray(jax.nn.softmax(pretrained.decoder.logits(pretrained.params, hidden)[0] / 1.5))
    found = np.bincount(tokens[:, 0], minlength=len(expected)) / count
    # Five standard deviations of each share.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / count) + 1e-3).all()
    # Later tokens have noise of their own.
    assert (tokens[:, 1] != tokens[:, 0]).mean() > 0.2


def test_a_low_temperature_is_greedy(pretrained):
    prompts = np.random.default_rng(0).integers(3, 28, (5, WIDTH)).astype(np.int32)
    mask = np.ones(prompts.shape, bool)
    greedy = lm.greedy(
        pretrained.decoder, pretrained.params, prompts, mask, max_new_tokens=3, stop_tokens=(-1,), pad_token=0
    )
    np.testing.assert_array_equal(first_tokens(pretrained, prompts, 1e-4, jax.random.split(KEY, 5)), greedy)


def test_an_example_samples_alike_wherever_it_is_in_a_batch(task):
    params, run = task.init(None), jax.jit(task.metrics)
    whole = run(params, task.train, key=KEY)["generated"]
    order = np.array([2, 0, 1, 1])
    again = run(params, jax.tree.map(lambda a: a[order], task.train), key=KEY)["generated"]
    np.testing.assert_array_equal(again, whole[order])
    wide = {**task.train, "tokens": np.pad(task.train["tokens"], ((0, 0), (3, 0)))}
    generate = jax.jit(lambda batch: task_keys(batch))
    np.testing.assert_array_equal(generate(wide), generate(task.train))
    other = run(params, task.train, key=jax.random.key(8))["generated"]
    assert not np.array_equal(other, whole)
    np.testing.assert_array_equal(
        run(params, task.train)["generated"], jax.jit(task.metrics)(params, task.train)["generated"]
    )


def task_keys(batch):
    from hiso_jax.tasks.text.generation import _keys_of

    tokens, length = batch["tokens"], batch["length"]
    mask = jnp.arange(tokens.shape[1]) >= tokens.shape[1] - length[:, None]
    return jax.random.key_data(_keys_of(KEY, tokens, mask))


def simulation(task, rounds=4, **given):
    """Every client has every example in every round, and nothing moves."""
    population = fed.iid(len(task.train["length"]), 1)
    config = fed.SimulationConfig(rounds=rounds, cohort=1, batch_size=16, mu=0.1, eval_every=rounds, **given)
    from hiso_jax import decomfl

    return fed.Simulation(task, decomfl(1e-30), population, config)


@pytest.mark.thorough
def test_rounds_have_samples_of_their_own(pretrained):
    losses = {}
    for temperature in (0.0, 2.0):
        made = fed.maximise(task_of(pretrained, temperature=temperature), "f1")
        result = simulation(made, rounds=6).run()
        losses[temperature] = result.records.loss
        again = simulation(made, rounds=6).run()
        np.testing.assert_array_equal(again.records.loss, result.records.loss)
    assert len(np.unique(losses[0.0])) == 1
    assert len(np.unique(losses[2.0])) > 1


def test_a_reward_of_text_is_what_python_says(pretrained):
    seen = []

    def score(prompt, answer, target):
        seen.append((prompt, answer, target))
        return len(answer) + 0.5 * (target == "great")

    task = task_of(pretrained)
    made = fed.maximise(task, text_reward(score))
    assert made.is_on_host
    seen.clear()
    params = task.init(None)
    losses = np.asarray(jax.jit(made.loss)(params, task.train))
    answers = task.answers(np.asarray(task.metrics(params, task.train)["generated"]))
    expected = [-(len(answer) + 0.5 * (number == 0)) for number, answer in enumerate(answers)]
    np.testing.assert_allclose(losses, expected)
    assert ("the film was fun :", answers[0], "great") in seen
    (said,) = notes(made, fed.iid(3, 1))
    assert said.startswith("the objective is Python on the host")


@pytest.mark.parametrize(
    ("score", "sentence"),
    [
        (lambda prompt, answer, target: 1 / 0, r"objective must return a number .*ZeroDivisionError"),
        (lambda prompt, answer, target: None, r"objective must return a number .*TypeError"),
    ],
)
def test_a_reward_that_fails_is_refused_before_a_run(pretrained, score, sentence):
    with pytest.raises(ParameterError, match=sentence):
        fed.maximise(task_of(pretrained), text_reward(score))


def test_a_reward_of_text_needs_text():
    from hiso_jax import tasks

    with pytest.raises(ParameterError, match="objective must be of a task that generates text"):
        fed.maximise(tasks.digits(), text_reward(lambda prompt, answer, target: 0.0))
    with pytest.raises(ParameterError, match=r"score must be a function of \(prompt, answer, target\)"):
        text_reward(lambda answer: 0.0)


REWARD = """
from hiso_jax.tasks.text import text_reward

def brief(*, words: int = 1):
    return text_reward(lambda prompt, answer, target: -abs(len(answer.split()) - words))

def none_of(*, token: int = 5):
    return lambda metrics, batch: -(metrics["generated"] == token).sum(1)
"""


def experiment_of(folder, tmp_path, **given):
    if not (tmp_path / "data").exists():
        write(tmp_path / "data", [SHORT, LONG] * 6)
        (tmp_path / "rewards.py").write_text(REWARD)
    return Experiment(
        task="chat", model=str(folder), data_dir=tmp_path / "data", trainable="all", algorithm="decomfl",
        learning_rate=0.002, rounds=6, eval_every=3, clients=3, cohort=3, batch_size=4, max_new_tokens=4, mu=0.02,
        **given,
    )  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize(
    "given",
    [
        {"objective": "f1", "temperature": 1.0},
        {"objective": "brief", "words": 2, "temperature": 0.7, "samples": 2},
        {"objective": "none_of"},
    ],
)
def test_a_run_by_a_reward_replays_and_resumes(folder, tmp_path, given):
    if given["objective"] != "f1":
        given = {**given, "objective": f"{tmp_path / 'rewards.py'}:{given['objective']}"}
    experiment = experiment_of(folder, tmp_path, **given)
    result = experiment.run(tmp_path / "run")
    replayed, _ = fed.replay(result.initial_params, experiment.algorithm, result.records)
    assert_trees_identical(replayed, result.params)
    assert np.ptp(result.records.scalars) > 0
    half = experiment_of(folder, tmp_path, **given)
    stopping = fed.Callback(lambda session, evaluation: session.round >= 3 and session.stop())
    half.run(tmp_path / "half", callbacks=stopping)
    again = experiment_of(folder, tmp_path, **given).run(tmp_path / "half", resume=True)
    assert_trees_identical(again.params, result.params)
    if "samples" in given:
        rows = read_samples(tmp_path / "half")
        assert [row["round"] for row in rows] == [0, 0, 3, 3, 6, 6]
        assert rows == read_samples(tmp_path / "run")
        assert set(rows[0]) == {"round", "prompt", "answer", "golden"}
        page = reports.as_page([reports.read_subject(tmp_path / "run")])
        assert "Answers after 6 rounds" in page


def test_shown_answers_are_those_of_the_first_rows(task):
    outputs = {name: np.asarray(value) for name, value in task.metrics(task.init(None), task.test).items()}
    rows = task.samples(outputs)
    assert [row["golden"] for row in rows] == [golden[0] for golden in task.golden[:2]]
    assert rows[0]["prompt"] == "the film was fun :"
    place = list(outputs["row"]).index(1)
    assert rows[1]["answer"] == task.answers(outputs["generated"])[place]


def test_samples_of_rounds_that_run_again_are_dropped(tmp_path):
    for rounds in (0, 5, 10):
        append_samples(tmp_path, rounds, [{"prompt": "p", "answer": "é", "golden": "g"}])
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"round": 15, "pro')
    cut_samples(tmp_path, 5)
    assert [json.loads(line)["round"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == [0, 5]


def test_a_temperature_without_an_objective_that_samples_is_refused(folder, tmp_path):
    with pytest.raises(ParameterError, match="temperature is read by objectives of generated answers"):
        _ = experiment_of(folder, tmp_path, temperature=0.5).task
    with pytest.raises(ParameterError, match="temperature must be a finite number ≥ 0, got -1"):
        _ = experiment_of(folder, tmp_path, temperature=-1.0, objective="f1").task


def test_classification_generates_nothing(folder, tmp_path):
    with pytest.raises(ParameterError, match="temperature is an option of `task` squad, drop, xsum, chat"):
        Experiment(task="sst2", model=str(folder), data_dir=data_folder(tmp_path / "d"), temperature=0.5)
