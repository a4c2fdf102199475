"""Run directories and deltas that an earlier release wrote, before a method was a value, lead to the same bits.

``legacy/finished`` is a run of decomfl with momentum and decay, ``legacy/interrupted`` one of hiso that was stopped
after 6 of 12 rounds, behind a snapshot after 4; ``legacy/finished.safetensors`` is the delta of the first.
"""

import json
import shutil
from pathlib import Path

import pytest

from hiso_jax import fed
from hiso_jax.fed.ledger import load_delta
from tests.cli.test_cli import call
from tests.fed.problems import assert_trees_identical

LEGACY = Path(__file__).parent.parent / "legacy"
WHOLE = "7bf7fb983c02916d952cbdf52be459a2a3edff11ddb3f8cbf1762f5858fcce09"
"""SHA-256 of the parameters of the interrupted run's twin that was left alone, as that release wrote it."""


@pytest.mark.thorough
@pytest.mark.parametrize("with_snapshots", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_interrupted_run_goes_on_to_the_same_bits(capsys, tmp_path, with_snapshots):
    run = tmp_path / "run"
    shutil.copytree(LEGACY / "interrupted", run)
    if not with_snapshots:
        shutil.rmtree(run / "snapshots")
    code, text, _ = call(capsys, "run", "--resume", run)
    assert code == 0
    assert "going on after 6 rounds" in text
    assert json.loads((run / "summary.json").read_text())["params_sha256"] == WHOLE
    assert fed.load(run).seal["params_sha256"] == WHOLE


def test_a_finished_run_is_shown_and_replayed(capsys):
    code, text, _ = call(capsys, "show", LEGACY / "finished")
    assert code == 0
    assert "every byte verified" in text
    assert "--sampler rademacher" in text
    code, text, _ = call(capsys, "replay", LEGACY / "finished")
    assert code == 0
    assert "equal to the run's, bit for bit" in text


def test_a_delta_is_written_and_applied_as_before(capsys, tmp_path):
    code, _, _ = call(capsys, "export", LEGACY / "finished", "--out", tmp_path / "delta.safetensors")
    assert code == 0
    now, before = (load_delta(path) for path in (tmp_path / "delta.safetensors", LEGACY / "finished.safetensors"))
    assert now.header == before.header
    assert_trees_identical(now.updates[1:], before.updates[1:])
    code, text, _ = call(capsys, "apply", LEGACY / "finished.safetensors", "--out", tmp_path / "model.safetensors")
    assert code == 0
    assert ", the run's" in text


def test_options_that_there_are_no_more_are_dropped(capsys, tmp_path):
    """Of a run of decomfl, that release wrote down the curvature's options, too."""
    about = fed.load(LEGACY / "finished").header["about"]
    assert about["algorithm"] == "decomfl"
    assert about["curvature_decay"] == 0.95
    assert about["sampler"] == "rademacher"
