"""Clients' own directions and few bits on the command line."""

import json

import pytest

from hiso_jax import algorithms, fed
from tests.cli.test_cli import SMALL, call
from tests.marks import slow

FOUR = [name for name in SMALL if name not in ("--perturbations", "2")]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "words",
    [
        ["--algorithm", "decomfl", "--direction-groups", "own", "--scalar-bits", "2", "--perturbations", "7"],
        slow(["--algorithm", "hiso+median+quantise", "--direction-groups", "2", "--aggregate-bits", "8"]),
    ],
)
def test_a_run_is_kept_shown_replayed_and_exported(capsys, tmp_path, words):
    run = tmp_path / "run"
    code, text, _ = call(capsys, "run", *FOUR, *words, "--out", run)
    assert code == 0
    assert "made by all clients, to measure along and to catch up" in text
    summary = json.loads((run / "summary.json").read_text())
    perturbations = fed.load(run).header["config"]["perturbations"]
    assert summary["directions"] > 12 * 4 * perturbations
    assert "bits a scalar" in call(capsys, "show", run)[1]
    assert "equal to the run's, bit for bit" in call(capsys, "replay", run)[1]
    assert call(capsys, "export", run)[0] == 0
    code, text, _ = call(capsys, "apply", run / "delta.safetensors", "--out", tmp_path / "model.safetensors")
    assert code == 0
    assert ", the run's" in text


@pytest.mark.slow
def test_mosaic_has_sixty_four_directions_and_twenty_bytes_and_compares_with_five(capsys, tmp_path):
    words = ["--algorithms", "decomfl,mosaic", "--learning-rate", "0.03,0.3", "--out", tmp_path / "out"]
    code, _, _ = call(capsys, "compare", *FOUR, *words)
    assert code == 0
    methods = json.loads((tmp_path / "out" / "comparison.json").read_text())["methods"]
    runs = {name: each["runs"] for name, each in methods.items()}
    decomfl, mosaic = runs["decomfl"][0], runs["mosaic"][0]
    assert decomfl["bytes_up"] == mosaic["bytes_up"] == 12 * 4 * 28
    assert (decomfl["forward_passes"], mosaic["forward_passes"]) == (12 * 4 * 6, 12 * 4 * 65)


def test_the_default_rate_falls_with_the_directions():
    method = algorithms.load("mosaic")
    whole = method.rate("digits")
    assert method.rate("digits", perturbations=16) == whole / 4
    assert method.rate("digits", perturbations=128) == whole
    assert algorithms.load("decomfl").rate("digits", perturbations=2) == algorithms.load("decomfl").rate("digits")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--direction-groups", "5"], "--direction-groups must be at most the clients of a round, 4, got 5"),
        (["--direction-groups", "none"], "--direction-groups must be own, shared or at least 1, got none"),
        (["--direction-blocks", "-1"], "--direction-blocks must be at least 0, got -1"),
        (["--scalar-bits", "3"], "--scalar-bits must be one of 1, 2, 4, 8, 32, got 3"),
        (["--scalar-bits", "2", "--bytes-up", "20"], "--scalar-bits must not be given beside --bytes-up"),
        (["--bytes-up", "8"], "--bytes-up must be at least 12 for 64 scalars a message, got 8"),
        (["--aggregate-bits", "2"], "--aggregate-bits must be one of 4, 8, 32, got 2"),
        (["--aggregate-bits", "4", "--relay", "messages"], "--aggregate-bits must be 32 with relay messages"),
    ],
)
def test_what_cannot_be_is_one_sentence(capsys, tmp_path, words, sentence):
    code, _, error = call(capsys, "run", "--algorithm", "mosaic", *FOUR, *words, "--out", tmp_path / "run")
    assert code == 2
    assert sentence in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("command", [["sweep"], ["compare", "--learning-rate", "0.1"]])
def test_every_command_tells_before_it_begins(capsys, tmp_path, command):
    words = ["--algorithms", "decomfl,mosaic", "--direction-groups", "5", "--out", tmp_path / "out"]
    code, _, error = call(capsys, *command, *FOUR, *words)
    assert code == 2
    assert "--direction-groups must be at most the clients of a round, 4, got 5" in error
    assert not (tmp_path / "out").exists()


def test_vectors_cannot_be_asked_for_few_bits(capsys, tmp_path):
    words = ["--algorithm", "fed_avg", "--scalar-bits", "2", "--out", tmp_path / "run"]
    code, _, error = call(capsys, "run", *words)
    assert code == 2
    assert "would have no effect on fed_avg" in error
    code, _, error = call(capsys, "run", "--algorithm", "fed_avg+quantise", "--out", tmp_path / "run")
    assert code == 2
    assert "must send scalars to go through quantise" in error


@pytest.mark.slow
def test_the_schedule_inverse_sqrt_is_replayed(capsys, tmp_path):
    run = tmp_path / "run"
    assert call(capsys, "run", *SMALL, "--schedule", "inverse-sqrt", "--out", run)[0] == 0
    assert "equal to the run's, bit for bit" in call(capsys, "replay", run)[1]
