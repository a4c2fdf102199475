"""Clients that backpropagate on the command line: mixed cohorts, their memory, and Hadamard directions."""

import json

import pytest

from hiso_jax import fed, plan, tasks
from hiso_jax.experiment import settings
from tests.cli.test_cli import SMALL, call

FOUR = [name for name in SMALL if name not in ("--perturbations", "2")]
MIXED = ["--algorithm", "local_mosaic", "--sampler", "hadamard", "--backprop-share"]


@pytest.mark.thorough
def test_a_mixed_run_is_kept_resumed_replayed_and_shared(capsys, tmp_path):
    run = tmp_path / "run"
    assert call(capsys, "run", *FOUR, *MIXED, "0.5", "--out", run)[0] == 0
    passes = json.loads((run / "summary.json").read_text())["forward_passes"]
    # P + 1 passes of a client that cannot backpropagate, and 3·K of one that can.
    assert 12 * 4 * 15 < passes < 12 * 4 * 129
    config = fed.load(run).header["config"]
    assert (config["backprop_share"], config["probe_scale"]) == (0.5, None)
    assert call(capsys, "run", "--resume", run, "--rounds", "14")[0] == 0
    assert "equal to the run's, bit for bit" in call(capsys, "replay", run)[1]
    assert call(capsys, "export", run)[0] == 0


@pytest.mark.thorough
def test_memory_decides_who_backpropagates(capsys, tmp_path, monkeypatch):
    needed, found = plan.training_bytes(tasks.digits(), 32) / 1e9, []
    for place, factor in enumerate((0.01, 100)):
        run = tmp_path / str(place)
        words = ["--batch-size", "32", "--memory-gb", str(factor * needed), "--memory-spread", "0"]
        assert call(capsys, "run", *FOUR, *MIXED, "memory", *words, "--out", run)[0] == 0
        found.append(json.loads((run / "summary.json").read_text())["forward_passes"])
    assert found == [12 * 4 * 129, 12 * 4 * 15]
    # A compiler that needs other bytes resumes the run with the same clients.
    monkeypatch.setattr(settings, "training_bytes", lambda task, batch_size: 10**12)
    assert call(capsys, "run", "--resume", tmp_path / "1", "--rounds", "14")[0] == 0
    assert json.loads((tmp_path / "1" / "summary.json").read_text())["forward_passes"] == 14 * 4 * 15


@pytest.mark.thorough
def test_a_comparison_mixes_the_cohorts_of_the_methods_that_project(capsys, tmp_path):
    words = ["--algorithms", "decomfl,local_mosaic", "--learning-rate", "0.03,3", "--backprop-share", "0.5"]
    assert call(capsys, "compare", *FOUR, *words, "--budget", "rounds", "--out", tmp_path / "out")[0] == 0
    methods = json.loads((tmp_path / "out" / "comparison.json").read_text())["methods"]
    passes = {name: each["runs"][0]["forward_passes"] for name, each in methods.items()}
    assert passes["decomfl"] == 12 * 4 * 6
    assert 12 * 4 * 15 < passes["local_mosaic"] < 12 * 4 * 129


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--backprop-share", "0.5"], "--backprop-share is read by methods whose clients project"),
        ([*MIXED, "1", "--mu", "0.1"], "--mu is read by methods that measure finite differences"),
        ([*MIXED, "1.5"], "--backprop-share must be between 0 and 1, got 1.5"),
        ([*MIXED, "memory"], "--memory-gb must be given with --backprop-share memory, and only then"),
        (["--memory-gb", "4"], "--memory-gb must be given with --backprop-share memory, and only then"),
        (["--memory-spread", "0.1"], "--memory-spread is read with --backprop-share memory"),
        (["--algorithm", "local_mosaic", "--probe-scale", "0.3"], "--probe-scale is read with --backprop-share"),
        ([*MIXED, "0.5", "--combine", "private_mean"], "--probe-scale must be given for a mixed cohort in a private"),
        (["--algorithm", "mosaic", "--sampler", "hadamard", "--direction-blocks", "8"], "must not be given with --sam"),
        (["--algorithm", "fed_kseed", "--sampler", "hadamard"], "--sampler must not be hadamard for directions from a"),
        (
            ["--sampler", "hadamard", "--directions", "keep"],
            "--directions must be regenerate with the sampler hadamard",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(capsys, tmp_path, words, sentence):
    code, _, error = call(capsys, "run", *FOUR, *words, "--out", tmp_path / "run")
    assert code == 2
    assert sentence in " ".join(error.split())
    assert not (tmp_path / "run").exists()
