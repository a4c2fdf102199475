"""Run directories and deltas of earlier releases lead to the same bits.

``legacy/finished`` is a run of decomfl with momentum and decay. ``legacy/interrupted`` is a run of hiso that was
stopped after 6 of 12 rounds, with a snapshot after 4. ``legacy/finished.safetensors`` is the delta of the first. Their
release did not yet have methods as values.

``legacy/0.2`` has runs of release 0.2, which wrote every option, chosen or not. Each was killed after 6 of 12 rounds;
the delta beside it is of its uninterrupted twin. All have 2 rounds a dispatch and an evaluation every 6 rounds.
``mosaic`` (``--perturbations 64 --scalar-bits 2``, with its snapshots), ``constant``, ``cosine`` (hiso with these
schedules) and ``inverse-sqrt`` (decomfl) have 4 of 20 clients, batches of 8 and, except for mosaic, 2 perturbations.
``lora`` is hiso on the small language model of the tests (2 of 4 clients, batches of 4, 2 perturbations, rate 1e-2).
"""

import json
import shutil
from pathlib import Path

import pytest

from hiso_jax import fed
from hiso_jax.fed.ledger import load_delta
from tests.cli.test_cli import call
from tests.fed.problems import assert_trees_identical
from tests.marks import slow
from tests.tasks.text.problems import data_folder, model_folder

LEGACY = Path(__file__).parent.parent / "legacy"
WHOLE = "7bf7fb983c02916d952cbdf52be459a2a3edff11ddb3f8cbf1762f5858fcce09"
"""SHA-256 of the parameters of the interrupted run's uninterrupted twin, as that release wrote it."""


@pytest.mark.thorough
@pytest.mark.parametrize("with_snapshots", [True, slow(False)])
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
    """That release recorded the curvature's options even for a run of decomfl."""
    about = fed.load(LEGACY / "finished").header["about"]
    assert about["algorithm"] == "decomfl"
    assert about["curvature_decay"] == 0.95
    assert about["sampler"] == "rademacher"


# Last bits of matrix products and of square roots are a processor's own. Release 0.2 itself goes on with these runs to
# the first digest on a Xeon with AVX-512, where they were recorded, and to the last on an AMD EPYC.
RUNS = {
    "mosaic": ("047a3da232952fe968113c42d17a94b0b04f24eb0466ef498e176f9c4be662fe",),
    "constant": ("20ae34838ed4908a2c6c6d853fd42437674853e15d6ce87c229028137394b02c",),
    "cosine": ("bd24ccfa4a1a115d7da9eb9a2b11b09c6606b1ac37a59a686fd529379fd8f620",),
    "inverse-sqrt": (
        "47fea13651b8fae04aea86c7527727700ce3400e724ee689af68a608e531f642",
        "f50775109ed7ccebbf1fe5cdcea17bbd14bbc5b637f51059ea0feb042a7b5089",
    ),
    "lora": (
        "c7a44db0e9aa3eb49f34d04684145eba944fa97bdb63f4c00b56611249e83404",
        "313fd76e1f7f7c7d12cecb138da6994b58d5c32cce1f1b730e9f3c29819e6fa4",
    ),
}
"""Name → SHA-256 of the parameters at the run's end, as release 0.2 makes them."""
# The delta of inverse-sqrt's twin, recorded on the Xeon, applied by release 0.2 on the EPYC.
ELSEWHERE = "8c9e90d1541bbf72ed6f94eb366692d110b297b88e815cce0d5de8c24f97c55b"


@pytest.mark.thorough
@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_release_0_2_goes_on_is_replayed_and_exported_to_the_same_bits(capsys, tmp_path, name):
    run, moved, base, old = tmp_path / "run", [], [], LEGACY / "0.2" / f"{name}.safetensors"
    shutil.copytree(LEGACY / "0.2" / name, run)
    if name == "lora":
        model, data = model_folder(tmp_path / "model"), data_folder(tmp_path / "data")
        moved, base = ["--model", model, "--data-dir", data], ["--base", model]
    code, text, errors = call(capsys, "run", "--resume", run, *moved)
    assert (code, errors) == (0, "")
    assert "going on after 6 rounds" in text
    digest = fed.load(run).seal["params_sha256"]
    assert digest in RUNS[name]
    assert "equal to the run's, bit for bit" in call(capsys, "replay", run, *moved[:2])[1]
    assert call(capsys, "export", run, "--out", tmp_path / "delta.safetensors")[0] == 0
    now, before = (load_delta(path).updates for path in (tmp_path / "delta.safetensors", old))
    # All rounds are the twin's where the run went on as it did; else those that were recorded.
    same = 12 if digest == RUNS[name][0] else 6
    assert_trees_identical(now.between(0, same)[1:], before.between(0, same)[1:])
    code, text, errors = call(capsys, "apply", old, "--out", tmp_path / "model.out", *base)
    if name == "inverse-sqrt" and digest == RUNS[name][1]:
        assert (code, ELSEWHERE in errors) == (2, True)
    else:
        assert (code, ", the run's" in text) == (0, True)
