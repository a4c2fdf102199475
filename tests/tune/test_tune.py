"""Sweeps and comparisons from Python are those of the command line; one program tunes a method."""

import io
import json
import signal
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

import hiso_jax
from hiso_jax import fed, tasks, tune
from hiso_jax.cli.main import main
from hiso_jax.experiment import build_task, methods_of, resolve
from hiso_jax.fed.run import interrupt as interrupts
from hiso_jax.tune.search import Candidate, Held
from tests.cli.test_cli import call
from tests.marks import thorough

NUMBERS = {"rounds": 8, "clients": 20, "cohort": 4, "perturbations": 2, "batch_size": 8, "eval_every": 4}
WORDS = [word for name, value in NUMBERS.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.thorough
def test_a_sweep_is_that_of_the_command_line_and_goes_on(capsys, tmp_path, monkeypatch):
    asked = {"learning_rate": [0.01, 0.05], "seeds": 2, **NUMBERS}
    swept = tune.sweep(["decomfl"], out=tmp_path / "python", **asked)
    options = ["--algorithms", "decomfl", "--learning-rate", "0.01,0.05", "--seeds", "2", *WORDS]
    code, text, errors = call(capsys, "sweep", *options, "--out", tmp_path / "sweep")
    assert (code, errors) == (0, "")
    written = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["decomfl"]
    final = np.array(written["final_accuracy"])
    rows = swept.rows()
    assert len(rows) == 4
    np.testing.assert_array_equal([row["final_accuracy"] for row in rows], final.reshape(-1))
    assert [row["learning_rate"] for row in rows] == [0.01, 0.05] * 2
    assert swept.best()["decomfl"].learning_rate == written["best"]["learning_rate"]
    assert repr(swept).splitlines()[-1] in text
    monkeypatch.setattr(fed, "sweep", None)
    assert tune.sweep(["decomfl"], out=tmp_path / "python", **asked).rows() == rows


@pytest.mark.thorough
def test_a_sweep_tries_the_clients_rates_with_every_rate(tmp_path, monkeypatch):
    asked = {**NUMBERS, "local_steps": 2}
    methods, rates = ["local_mosaic", "hiso"], {"learning_rate": [0.5, 2.0], "local_learning_rates": [0.1, 0.3]}
    swept = tune.sweep(methods, out=tmp_path / "out", **rates, **asked)
    rows = [row for row in swept.rows() if row["algorithm"] == "local_mosaic"]
    assert [(row["learning_rate"], row["local_learning_rate"]) for row in rows] == [
        (0.5, 0.1), (2.0, 0.1), (0.5, 0.3), (2.0, 0.3)
    ]  # fmt: skip
    best = swept.best()["local_mosaic"]
    assert best.final == max(row["final_accuracy"] for row in rows)
    assert best.local_rate in (0.1, 0.3)
    # One pair of rates has the result of a sweep with these rates alone.
    alone = tune.sweep(["local_mosaic"], learning_rate=[2.0], local_learning_rate=0.3, **asked).rows()
    np.testing.assert_allclose(alone[0]["final_accuracy"], rows[3]["final_accuracy"], atol=0.02)
    monkeypatch.setattr(fed, "sweep", None)
    assert tune.sweep(methods, out=tmp_path / "out", **rates, **asked).rows() == swept.rows()
    with pytest.raises(ValueError, match="local_learning_rates is read by methods that send scalars"):
        tune.sweep(["decomfl"], local_learning_rates=[0.1], **NUMBERS)


@pytest.mark.thorough
def test_a_comparison_is_that_of_the_command_line_and_goes_on(capsys, tmp_path):
    asked = {"learning_rate": [0.02], "seeds": 2, **NUMBERS}
    found = tune.compare(["decomfl", "hiso"], out=tmp_path / "python", **asked)
    options = ["--algorithms", "decomfl,hiso", "--learning-rate", "0.02", "--seeds", "2", *WORDS]
    code, _, errors = call(capsys, "compare", *options, "--out", tmp_path / "command")
    assert (code, errors) == (0, "")
    written = json.loads((tmp_path / "command" / "comparison.json").read_text())["methods"]
    digests = [run["params_sha256"] for name in ("decomfl", "hiso") for run in written[name]["runs"]]
    assert [row["params_sha256"] for row in found.rows()] == digests
    assert {row["schedule"] for row in found.rows()} == {"constant"}
    assert "decomfl" in repr(found)
    said = []

    class Heard(tune.Watcher):
        def say(self, sentence):
            said.append(sentence)

    again = tune.compare(["decomfl", "hiso"], out=tmp_path / "python", watcher=Heard(), **asked)
    assert [sentence for sentence in said if sentence.endswith("rounds are done")]
    assert [row["params_sha256"] for row in again.rows()] == digests
    with pytest.raises(hiso_jax.ParameterError, match="out must be new, or of a study with the same settings"):
        tune.compare(["decomfl"], out=tmp_path / "python", **asked)


@pytest.mark.thorough
def test_the_first_interrupt_ends_a_study_and_keeps_what_was_done(monkeypatch, tmp_path):
    """It comes while a method is tuned; the comparison says so, and goes on later."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(interrupts, "_interrupted_at", -interrupts.AGAIN_SECONDS)

    class Interrupts(tune.Watcher):
        @contextmanager
        def searching(self, title, rounds):
            yield lambda done, total: signal.raise_signal(signal.SIGINT) if done == 0 else False

    asked = {"seeds": 1, "tries": 3, "tuning_seeds": 1, "schedules": ["constant"], **NUMBERS}
    stopped = tune.compare(["decomfl"], out=tmp_path / "out", watcher=Interrupts(), **asked)
    assert stopped.interrupted
    assert not stopped.rows()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    shown = io.StringIO()
    watcher = tune.Progress(Console(file=shown, width=200))
    assert not tune.compare(["decomfl"], out=tmp_path / "out", watcher=watcher, **asked).interrupted
    lines = shown.getvalue().splitlines()
    for expected in (
        "digits decomfl: 1 setting of 8 rounds",
        "decomfl: of 3 runs best at rate",
        "decomfl seed 0: round 8/8",
    ):
        assert any(line.startswith(expected) for line in lines), (expected, lines)


def test_methods_of_a_study_are_names():
    with pytest.raises(
        hiso_jax.ParameterError,
        match=r'^algorithms must be names, or "FILE:NAME" for your own code: files record them; got a function',
    ):
        tune.compare([lambda rate: None])
    assert hiso_jax.fed_avg is hiso_jax.algorithms.fed_avg


@pytest.mark.thorough
def test_one_program_tunes_a_method(tmp_path, monkeypatch):
    compiled, original = [], fed.sweep

    def counted(*given, programs=None, **more):
        before = len(programs)
        result = original(*given, programs=programs, **more)
        compiled.append(len(programs) - before)
        return result

    monkeypatch.setattr(fed, "sweep", counted)
    found = tune.compare(["decomfl"], seeds=1, tries=4, tuning_seeds=1, **NUMBERS)
    trials = found.compared["decomfl"].tuned["trials"]
    assert len(trials) == 12
    assert {trial["schedule"] for trial in trials} == {"constant", "cosine", "inverse-sqrt"}
    assert compiled == [1, 0, 0, 0]


@pytest.mark.thorough
def test_both_rates_of_projections_are_tuned_within_the_same_budget(tmp_path):
    """The method has as many tuning runs as one with schedules; its run has the clients' rate that was best."""
    asked = {"seeds": 1, "tries": 3, "tuning_seeds": 1, "schedules": ["constant", "cosine"], **NUMBERS}
    found = tune.compare(["decomfl", "local_mosaic"], out=tmp_path / "out", **asked)
    trials = json.loads((tmp_path / "out" / "tuning.json").read_text())["trials"]
    own = {name: [trial for trial in trials if trial["algorithm"] == name] for name in ("decomfl", "local_mosaic")}
    assert len(own["decomfl"]) == len(own["local_mosaic"]) == 6
    assert {trial["local_learning_rate"] for trial in own["decomfl"]} == {None}
    assert {trial["schedule"] for trial in own["decomfl"]} == {"constant", "cosine"}
    assert {(trial["schedule"], trial["local_learning_rate"]) for trial in own["local_mosaic"]} == {
        ("constant", 0.6),
        ("constant", 0.3),
    }
    (folder,) = (tmp_path / "out" / "runs").glob("*local_mosaic*")
    config = fed.load(folder).header["config"]
    assert config["local_steps"] == 5
    assert config["local_learning_rate"] == found.compared["local_mosaic"].tuned["local_learning_rate"]


@pytest.mark.thorough
@pytest.mark.parametrize("schedule", ["cosine", *(thorough(name) for name in ("constant", "inverse-sqrt"))])
def test_rates_as_arrays_lead_where_the_schedule_leads(schedule):
    names = {"algorithm": "hiso", "schedules": (schedule,)}
    settings = resolve(tune.Compare, names).settings({**NUMBERS, "schedules": (schedule,), "algorithms": ("hiso",)})
    task = build_task(settings)
    held = Held(settings, task, [0])
    (method,) = methods_of(["hiso"]).values()
    plain = held.sweep(replace(settings, schedule=schedule), method, [0.05], tune.Watcher(), None)
    table = held.search(settings, method, [Candidate(schedule, None, 0.05)], tune.Watcher(), fed.Programs())
    for name in ("accuracy", "loss"):
        np.testing.assert_allclose(table.metrics[name], plain.metrics[name], atol=3e-3)
    # The rates have an effect: other rates lead to other losses.
    other = held.search(settings, method, [Candidate(schedule, None, 0.2)], tune.Watcher(), fed.Programs())
    assert np.abs(other.metrics["loss"] - table.metrics["loss"]).max() > 0.02


def test_what_cannot_be_tuned_is_one_sentence(capsys):
    with pytest.raises(hiso_jax.ParameterError, match=r"^frames is no option of compare"):
        tune.compare(["hiso"], frames=3)
    with pytest.raises(hiso_jax.ParameterError, match=r"^resume must be given as `out`"):
        tune.compare(["hiso"], resume="somewhere")
    with pytest.raises(hiso_jax.ParameterError, match=r"^learning_rate must not be given: it is looked for"):
        tune.find_rate(learning_rate=0.1)
    with pytest.raises(hiso_jax.ParameterError, match=r"^algorithm must be one of"):
        tune.sweep(["nothing"])
    with pytest.raises(hiso_jax.ParameterError, match=r"^schedule must be one of constant, cosine"):
        tune.compare(["hiso"], schedules=["step"])
    with pytest.raises(SystemExit):
        main(["compare", "--schedules", "step"])
    assert capsys.readouterr().err.startswith("hiso-jax: error: --schedules must be one of constant, cosine")


def test_a_study_takes_a_task_as_a_value(tmp_path):
    task = tasks.digits()
    numbers = dict(rounds=4, clients=10, cohort=2, perturbations=1, batch_size=4, eval_every=2, seeds=1)
    by_value = tune.sweep(["decomfl"], task=task, learning_rate=[0.01], **numbers).rows()
    by_name = tune.sweep(["decomfl"], task="digits", learning_rate=[0.01], **numbers).rows()
    assert by_value == by_name
    found = tune.compare(["decomfl"], task=task, learning_rate=[0.01], **numbers)
    assert found.rows()[0]["rounds"] == 4
    with pytest.raises(hiso_jax.ParameterError, match="out cannot be given with a task that is a value"):
        tune.compare(["decomfl"], task=task, learning_rate=[0.01], out=tmp_path / "study", **numbers)
