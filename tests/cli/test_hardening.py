"""Files that a stranger forged or an accident damaged, signals, and a standard output that closes."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

import hiso_jax
from hiso_jax import fed, reports
from hiso_jax.fed.ledger import LEDGER, Delta, Lost, frames, load_delta, save_delta
from tests.callbacks import StopAt
from tests.cli.test_cli import SMALL, call
from tests.fed.problems import assert_trees_identical, digits_population, linear_task
from tests.fuzz import fuzz
from tests.marks import slow

TX = hiso_jax.hiso(0.02)


def simulation(storage, *, rounds=12, task=None, at=None):
    """A simulation; ``at`` is (round, function): the function is called with the session after that round."""
    config = fed.SimulationConfig(
        rounds=rounds, cohort=4, perturbations=2, batch_size=8, eval_every=5, rounds_per_dispatch=1
    )
    callbacks = [] if at is None else [fed.Callback(lambda session, _: session.round == at[0] and at[1](session))]
    return fed.Simulation(task or linear_task(), TX, digits_population(), config, storage=storage, callbacks=callbacks)


def stop(session):
    session.stop()


@pytest.mark.thorough
def test_what_strangers_hand_over_is_answered_in_a_sentence():
    counted, wrong = fuzz(25, 3)
    assert wrong == []
    assert sum(counted.values()) == 25


@pytest.mark.thorough
def test_the_ledger_itself_is_locked(tmp_path):
    """A user who removes ``.lock`` because it looks stale, and resumes twice, destroys nothing."""

    def resume_again(session):
        (tmp_path / "run" / ".lock").unlink()
        with pytest.raises(ValueError, match="is being written by another process, and a run has one writer"):
            simulation(fed.Storage(tmp_path / "run", resume=True)).run()

    result = simulation(fed.Storage(tmp_path / "run"), at=(6, resume_again)).run()
    assert (result.rounds, len(fed.load(tmp_path / "run").rows)) == (12, 12)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda path: shutil.rmtree(path.parent), "it was removed while the run went on"),
        (lambda path: (path.unlink(), path.write_bytes(b"mine")), "it was replaced by another file"),
        (lambda path: path.open("ab").write(b"mine"), "another process has written to it"),
    ],
)
def test_a_ledger_that_is_gone_is_noticed_at_the_next_round(tmp_path, harm, sentence):
    path = tmp_path / "run" / LEDGER
    with pytest.raises(Lost, match=sentence) as caught:
        simulation(fed.Storage(path.parent), at=(3, lambda session: harm(path))).run()
    assert caught.value.filename == str(path)
    if path.exists():
        assert path.read_bytes().endswith(b"mine")


def test_a_run_may_be_given_more_rounds(tmp_path):
    whole = simulation(fed.Storage(tmp_path / "whole"), rounds=20).run()
    simulation(fed.Storage(tmp_path / "run"), rounds=12).run()
    for rounds, stopped in ((16, (14, stop)), (20, None)):
        result = simulation(fed.Storage(str(tmp_path / "run"), resume=True), rounds=rounds, at=stopped).run()
    assert_trees_identical((result.params, result.state), (whole.params, whole.state))
    assert [row.round for row in result.metrics] == [row.round for row in whole.metrics] == [0, 5, 10, 15, 20]
    ledger = fed.load(tmp_path / "run")
    assert (ledger.planned, len(ledger.rows), ledger.seal["rounds"]) == (20, 20, 20)
    np.testing.assert_array_equal(ledger.rows, fed.load(tmp_path / "whole").rows)


def test_a_finished_run_is_not_compiled_again(tmp_path, monkeypatch):
    first = simulation(fed.Storage(tmp_path / "run")).run()
    monkeypatch.setattr("hiso_jax.fed.run.programs.Programs.compile", None)
    again = simulation(fed.Storage(tmp_path / "run", resume=True)).run()
    assert_trees_identical((again.params, again.state), (first.params, first.state))
    assert again.metrics == first.metrics


@pytest.mark.thorough
def test_a_processor_that_begins_elsewhere_goes_on_from_a_snapshot(tmp_path):
    """This happens on a cluster whose machines round initial parameters differently."""

    def init(key):
        return jax.tree.map(lambda x: x * np.float32(1.000001), linear_task().model_init(key))

    other = dataclasses.replace(linear_task(), model_init=init)
    whole = simulation(fed.Storage(tmp_path / "whole")).run()
    kept = fed.Storage(tmp_path / "run", snapshot_every=4)
    simulation(kept, at=(9, stop)).run()
    with pytest.raises(ValueError, match=r"the initial parameters differ .* `from_snapshot` continues from the newest"):
        simulation(dataclasses.replace(kept, resume=True), task=other).run()
    result = simulation(dataclasses.replace(kept, resume=True, from_snapshot=True), task=other).run()
    assert_trees_identical((result.params, result.state), (whole.params, whole.state))
    shutil.rmtree(tmp_path / "run" / "snapshots")
    (tmp_path / "run" / LEDGER).write_bytes(fed.load(tmp_path / "run").path.read_bytes()[:-400])
    with pytest.raises(ValueError, match="from_snapshot needs a snapshot"):
        simulation(dataclasses.replace(kept, resume=True, from_snapshot=True), task=other).run()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from rich.console import Console

    from hiso_jax.cli.options import Run
    from hiso_jax.cli.run import run

    out = tmp_path_factory.mktemp("digits") / "run"
    assert run(Run(rounds=12, clients=20, cohort=4, eval_every=4, perturbations=2, out=out), Console(quiet=True)) == 0
    return out


def test_the_rounds_before_the_damage_are_salvaged(capsys, finished, tmp_path):
    content = bytearray((finished / LEDGER).read_bytes())
    ends = [frame.end for frame in frames.read_frames(bytes(content)) if frame.kind == b"RNDS"]
    content[ends[-1] - 60] ^= 1
    (tmp_path / LEDGER).write_bytes(content)
    code, _, errors = call(capsys, "show", tmp_path)
    assert code == 2
    assert "(hiso-jax show --salvage FOLDER keeps the rounds before it)" in errors
    code, _, errors = call(capsys, "show", tmp_path, "--salvage", tmp_path / "good")
    assert (code, errors) == (0, "")
    kept = fed.load(tmp_path / "good", unfinished=True)
    assert 0 < len(kept.rows) < 12
    np.testing.assert_array_equal(kept.rows, fed.load(finished).rows[: len(kept.rows)])
    assert call(capsys, "run", "--resume", tmp_path / "good")[0] == 0
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (finished, tmp_path / "good")]
    assert summaries[0]["params_sha256"] == summaries[1]["params_sha256"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "curves.png", "snapshots", LEDGER, ".lock"])
def test_links_in_a_run_s_folder_are_not_followed(capsys, finished, tmp_path, name):
    run = shutil.copytree(finished, tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    target = elsewhere if name == "snapshots" else elsewhere / "precious"
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(target)
    code, text, errors = call(capsys, "run", "--resume", run)
    assert (code, text) == (2, "")
    assert f"--resume must be a directory that holds its own files; {run / name} is a link to {target}" in errors
    assert (elsewhere / "precious").read_text() == "mine"


def test_nothing_that_a_file_says_acts_on_a_terminal(capsys, tmp_path):
    about = {"task": "digits\n  integrity  signed by the author", "algorithm": "\x1b[31mhiso", "model": "\u202egnp"}
    simulation(fed.Storage(tmp_path / "run", about)).run()
    code, text, errors = call(capsys, "show", tmp_path / "run")
    assert (code, errors) == (0, "")
    assert [line.split()[0] for line in text.splitlines()].count("integrity") == 1
    assert all(character.isprintable() or character == "\n" for character in text)
    assert r"digits\n  integrity  signed by the author, \x1b[31mhiso" in text


def test_a_delta_that_leads_elsewhere_is_not_written(capsys, finished, tmp_path):
    path, out = tmp_path / "delta.safetensors", tmp_path / "model.safetensors"
    code, text, _ = call(capsys, "export", finished, "--out", path)
    known = text.split("SHA-256 ")[2].split(",")[0]
    assert call(capsys, "apply", path, "--out", out, "--expect-sha256", known)[0] == 0
    out.unlink()
    code, _, errors = call(capsys, "apply", path, "--out", out, "--expect-sha256", "0" * 64)
    assert (code, out.exists()) == (2, False)
    assert f"--expect-sha256 must be that of {path}, which is {known}" in errors
    delta = load_delta(path)
    other = [number + 0.5 for number in delta.header["sample"]]
    save_delta(Delta({**delta.header, "params_sha256": "ab" * 32, "sample": other}, delta.updates), path)
    code, text, errors = call(capsys, "apply", path, "--out", out)
    assert (code, text, out.exists()) == (2, "", False)
    assert "the model is not the run's to the last bit" in errors
    assert "of 64 of them, evenly spread, the farthest is off by 0.5" in errors
    code, text, errors = call(capsys, "apply", path, "--out", out, "--accept-difference")
    assert (code, errors, out.exists()) == (0, "", True)
    assert "not the run's to the last bit: of 64 of them" in text


LONG = ["--rounds", "1000000", "--clients", "20", "--cohort", "4", "--perturbations", "2", "--eval-every", "1000"]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        slow(signal.SIGHUP, 129),
        slow(signal.SIGINT, 130),
    ],
)
def test_what_schedulers_send_ends_a_run_like_ctrl_c(capsys, tmp_path, number, code):
    out = tmp_path / "run"

    def strike():
        if (out / LEDGER).exists() and len(fed.load(out, unfinished=True).rows) > 3:
            os.kill(os.getpid(), number)
        else:
            threading.Timer(0.2, strike).start()

    threading.Timer(0.5, strike).start()
    ended, text, errors = call(capsys, "run", *LONG, "--out", out)
    assert (ended, errors) == (code, "")
    assert f"go on with: hiso-jax run --resume {out}" in text
    assert len(fed.load(out, unfinished=True).rows) > 3
    assert json.loads((out / "summary.json").read_text())["interrupted"] is True
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_before_the_first_round_is_no_traceback(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("hiso_jax.cli.run.load_task", lambda *given: os.kill(os.getpid(), signal.SIGTERM))
    code, text, errors = call(capsys, "run", "--out", tmp_path / "run")
    assert (code, text, errors) == (143, "", "hiso-jax: interrupted\n")


def test_output_that_nobody_reads_does_not_end_a_run(capsys, tmp_path, monkeypatch):
    """This happens in ``hiso-jax run | head -1``."""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w", buffering=1))
    code, _, errors = call(capsys, "run", *SMALL, "--out", tmp_path / "run")
    assert code == 0
    assert errors == "hiso-jax: standard output cannot be written (Broken pipe); the command goes on without\n"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 12


@pytest.mark.thorough
def test_a_sweep_goes_on_where_it_was(capsys, tmp_path, monkeypatch):
    out = tmp_path / "sweep"
    options = [*SMALL, "--learning-rate", "0.01,0.02", "--algorithms", "decomfl"]
    assert call(capsys, "sweep", *options, "--out", out)[0] == 0
    before = json.loads((out / "sweep.json").read_text())
    (out / "sweep.png").unlink()
    monkeypatch.setattr(fed, "sweep", None)
    code, _, errors = call(capsys, "sweep", "--resume", out)
    assert (code, errors) == (0, "")
    assert json.loads((out / "sweep.json").read_text()) == before
    assert (out / "sweep.png").exists()


def test_a_run_kept_from_python_has_a_report(tmp_path):
    config = fed.SimulationConfig(rounds=12, cohort=4, perturbations=2, batch_size=8, eval_every=5)
    parts, report = (linear_task(), TX, digits_population(), config), reports.Report()
    result = fed.Simulation(*parts, storage=fed.Storage(str(tmp_path / "run")), callbacks=[report]).run()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        LEDGER, ".lock", "metrics.jsonl", "summary.json", "curves.png",
    }  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 5, 10, 12]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["task"], summary["rounds"]) == ("linear", 12)
    assert summary["params_sha256"] == fed.fingerprint(result.params) == report.summary["params_sha256"]


def test_an_evaluation_without_the_metric_that_counts_is_refused(capsys, tmp_path):
    """The ledger is forged: one entry is renamed, and every digest is computed again."""
    out = tmp_path / "run"
    assert call(capsys, "run", *SMALL, "--out", out)[0] == 0
    kept, seen = [], 0
    for frame in frames.read_frames((out / LEDGER).read_bytes()):
        payload = bytes(frame.payload)
        seen += frame.kind == b"EVAL"
        kept.append((frame.kind, payload.replace(b'"accuracy"', b'"akkuracy"') if seen == 2 else payload))
    chain = hashlib.sha256(frames.MAGIC)
    forged = b"".join(frames.frame_bytes(kind, payload, chain) for kind, payload in kept if kind != b"SEAL")
    (out / LEDGER).write_bytes(frames.MAGIC + forged)
    code, _, errors = call(capsys, "run", "--resume", out)
    assert (code, errors.count("\n")) == (2, 1)
    assert "is refused: its evaluation after round " in errors
    assert "has no accuracy" in errors


def test_a_report_of_fewer_rounds_is_written_anew(tmp_path):
    """An interrupted run has a report; the resumed run is killed between its last round and its report."""
    config = fed.SimulationConfig(
        rounds=12, cohort=4, perturbations=2, batch_size=8, eval_every=5, rounds_per_dispatch=1
    )
    parts = linear_task(), TX, digits_population(), config
    first = fed.Simulation(*parts, storage=fed.Storage(tmp_path / "run"), callbacks=[reports.Report(), StopAt(6)])
    assert first.run().interrupted
    again = fed.Storage(tmp_path / "run", resume=True)
    # This run writes the ledger and no report.
    result = fed.Simulation(*parts, storage=again).run()
    fed.Simulation(*parts, storage=again, callbacks=[reports.Report()]).run()
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (written["rounds"], written["interrupted"]) == (12, False)
    assert written["params_sha256"] == fed.fingerprint(result.params)
    # A run that has its report does not write it again.
    changed = (tmp_path / "run" / "summary.json").stat().st_mtime_ns
    fed.Simulation(*parts, storage=again, callbacks=[reports.Report()]).run()
    assert (tmp_path / "run" / "summary.json").stat().st_mtime_ns == changed


@pytest.mark.thorough
def test_a_rate_is_found_and_told(capsys, tmp_path):
    out = tmp_path / "run"
    options = ["--rounds", "12", "--clients", "20", "--cohort", "4", "--learning-rate", "auto", "--probe-rounds", "8"]
    code, text, errors = call(capsys, "run", *options, "--eval-every", "6", "--out", out)
    assert (code, errors) == (0, "")
    probe = fed.load(out).header["about"]["probe"]
    assert probe["learning_rates"] == [0.0057, 0.017, 0.051, 0.15]
    assert probe["fastest"] == probe["learning_rates"][int(np.argmin([loss or np.inf for loss in probe["losses"]]))]
    assert probe["learning_rate"] == fed.load(out).header["about"]["learning_rate"]
    assert probe["learning_rate"] in (probe["fastest"], float(f"{probe['fastest'] / 3:.2g}"))
    # Four rates have 8 rounds of 4 clients each; a client takes 6 loss evaluations and sends 8 + 20 bytes.
    assert (probe["forward_passes"], probe["bytes_up"]) == (4 * 8 * 4 * 6, 4 * 8 * 4 * 28)
    assert f"{probe['learning_rate']:g} is taken, " in text
    assert f"rate {probe['learning_rate']:g}" in text
    assert call(capsys, "replay", out)[0] == 0


@pytest.mark.thorough
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_unicode_is_told_all_the_same(tmp_path, encoding):
    words = ["run", "--rounds", "2", "--eval-every", "2", "--clients", "10", "--cohort", "2", "--perturbations", "1"]
    ended = subprocess.run(
        [sys.executable, "-m", "hiso_jax.cli.main", *words, "--combine", "private_mean", "--noise-multiplier", "2"],
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        timeout=200,
    )
    text = ended.stdout.decode(encoding)
    assert ended.returncode == 0, ended.stderr
    assert "accuracy" in text
    assert "runs" in text
    assert "?" not in text
    if encoding == "ascii":
        assert "epsilon" in text
        assert "..." in text


@pytest.mark.thorough
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_platform_that_is_not_here_is_one_sentence(tmp_path, platform):
    ended = subprocess.run(
        [sys.executable, "-m", "hiso_jax.cli.main", "run", "--rounds", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": platform},
        timeout=200,
    )
    if ended.returncode == 0:
        pytest.skip(f"there is a {platform} here")
    assert ended.returncode == 2
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith(f"hiso-jax: error: JAX_PLATFORMS must name available devices, cpu always is; got {platform}")
