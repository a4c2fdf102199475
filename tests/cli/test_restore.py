"""Options restored from a directory: the recorded ones, those given again, and refusals."""

import json

import numpy as np
import pytest

from hiso_jax import Experiment, tune
from hiso_jax.checks import ParameterError
from hiso_jax.cli.arguments import parse
from hiso_jax.cli.main import main
from hiso_jax.cli.options import Run
from hiso_jax.cli.restore import options_of
from hiso_jax.cli.resume import resumed
from hiso_jax.cli.share import _without_places
from hiso_jax.experiment import as_written, own_options
from hiso_jax.experiment.resolve import OF_STUDIES
from hiso_jax.reports import as_json

USERS = """
from pathlib import Path

import hiso_jax
from hiso_jax import tasks
from hiso_jax.choices import defaults

tx, table = hiso_jax.hiso(0.01), {}


def unlabelled(seed):
    return tasks.digits()


unlabelled.labelled = False


@defaults(combine="median", sampler="low_rank", rounds=7)
def chooses(seed):
    return tasks.digits()


@defaults(round=7)
def misspelt(seed):
    return tasks.digits()


def nothing(seed):
    return None


def a_list(train, clients):
    return []


def reserved(train, clients, seed, *, method: str = "kmeans"):
    return None


def several(train, clients, seed, *, sizes: tuple[int, ...] = (1, 2)):
    return None
"""


@pytest.fixture
def users(tmp_path, monkeypatch):
    (tmp_path / "users.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "about",
    [
        {"algorithm": "hiso", "task": "squad", "partition": "iid"},
        {"algorithm": "hiso", "task": "text-classification", "partition": "by-column", "clients": 6, "cohort": 8},
    ],
)
def test_a_replay_takes_what_the_run_had(about):
    """A replay needs no partition, and does not judge the one that stands in its place."""
    found = options_of(about)
    assert (found.task, found.cohort) == (about["task"], about.get("cohort", found.cohort))


def written(directory, **about):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(about))
    return directory


def test_an_option_given_at_its_default_is_heeded(tmp_path):
    run = written(tmp_path / "run", algorithm="hiso", task="digits", rounds=12, model_shards=2)
    assert resumed(parse(Run, "run", ["--resume", str(run)])).model_shards == 2
    found = resumed(parse(Run, "run", ["--resume", str(run), "--rounds", "1500", "--model-shards", "1"]))
    assert (found.rounds, found.model_shards) == (1500, 1)


def test_a_run_of_unlabelled_examples_is_resumed(users):
    run = written(
        users / "run", **as_written(parse(Run, "run", ["--task", "users.py:unlabelled", "--partition", "iid"]))
    )
    found = resumed(parse(Run, "run", ["--resume", str(run), "--task", "users.py:unlabelled"]))
    assert (found.task, found.partition) == ("users.py:unlabelled", "iid")


@pytest.mark.parametrize(("option", "names"), [("algorithms", ["evil.py:f"]), ("schedules", ["constant", "evil.py:f"])])
def test_a_directory_runs_no_code(users, capsys, option, names):
    (users / "evil.py").write_text("raise RuntimeError('run')")
    study = written(users / "study", **{"algorithms": ["hiso"], "protocol": "cost-to-target", option: names})
    with pytest.raises(SystemExit):
        main(["compare", "--resume", str(study)])
    assert f"--{option} must name evil.py:f again, which is its user's own" in capsys.readouterr().err


def refusal(capsys, *words):
    with pytest.raises(SystemExit) as ending:
        main(list(words))
    assert ending.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    return sentence


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--algorithm", "users.py:table"], "--algorithm users.py:table must be a function (learning_rate, *,"),
        (["--partition", "users.py:table"], "--partition users.py:table must be a function (train, clients, seed, *,"),
        (["--partition", "users.py:a_list"], "--partition users.py:a_list must return a Population, got a list"),
        (["--partition", "users.py:reserved"], "reserved has an option method, which is the command's own"),
        (["--partition", "users.py:several"], "several has an option sizes that cannot be one"),
        (["--task", "users.py:nothing"], "--task users.py:nothing must return a Task, got a NoneType"),
        (["--task", "users.py:misspelt"], "declares a default of round, which is no option; did you mean rounds?"),
    ],
)
def test_an_own_choice_of_another_form_is_refused(users, capsys, words, sentence):
    assert sentence in refusal(capsys, "run", *words, "--rounds", "2")


def test_a_task_declares_other_choices(users):
    found = parse(Run, "run", ["--task", "users.py:chooses"])
    assert (found.algorithm, found.sampler, found.rank, found.rounds) == ("hiso+median", "low_rank", 1, 7)
    found = parse(Run, "run", ["--task", "users.py:chooses", "--combine", "mean", "--sampler", "gaussian"])
    assert (found.algorithm, found.sampler) == ("hiso+mean", "gaussian")


def test_a_folder_with_the_name_of_a_network_is_no_checkpoint(users):
    (users / "mlp").mkdir()
    assert as_written(parse(Run, "run", []))["model"] == "mlp"


def test_numbers_of_numpy_are_written_as_numbers():
    found = as_json({"seed": np.int64(3), "rates": (np.float32(0.5), np.float64("nan"))})
    assert json.dumps(found) == '{"seed": 3, "rates": [0.5, null]}'


def test_a_delta_holds_no_path():
    about = {"model": "/home/me/opt", "partition": "/home/me/mine.py:by_file", "regions_file": "/home/me/r.csv"}
    kept = _without_places({**about, "column": "speaker", "rounds": 3})
    assert kept == {
        "model": "opt",
        "partition": "mine.py:by_file",
        "regions_file": None,
        "column": "speaker",
        "rounds": 3,
    }


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Experiment(partition=lambda train: train), "partition must be a name, or FILE:NAME; got a value"),
        (lambda: Experiment(schedule=None), "schedule must be a name, or FILE:NAME; got a value, a NoneType"),
        (lambda: tune.compare("hiso,decomfl,hiso"), "algorithms must not repeat, got hiso,decomfl,hiso"),
        (lambda: tune.sweep(["hiso"], mus=-1.0), "mus must be a positive finite number, got -1.0"),
        (
            lambda: tune.compare(["hiso", "decomfl"], learning_rate=["hiso=0.1", "decomfl=0.1", "hiso=0.2"]),
            "learning_rate must name each algorithm once",
        ),
    ],
)
def test_python_gets_a_sentence(call, sentence):
    with pytest.raises(ParameterError, match=sentence.replace("(", r"\(")):
        call()


def test_an_option_that_does_not_exist_is_no_option_of_the_run(users, capsys):
    run = written(users / "run", algorithm="hiso")
    assert "--roundz is no option of run; did you mean --rounds?" in refusal(
        capsys, "run", "--resume", str(run), "--roundz", "5"
    )
    # Options of channels exist, although the run's method has none.
    sentence = refusal(capsys, "run", "--resume", str(run), "--noise-multiplier", "1")
    assert "--noise-multiplier cannot be given with --resume: the run has its own" in sentence


def test_the_options_of_studies_are_known():
    """A task may declare defaults for them, which the other commands leave alone."""
    of_runs = own_options(Run).keys()
    assert {*OF_STUDIES} == {*own_options(tune.Sweep), *own_options(tune.Compare)} - of_runs
