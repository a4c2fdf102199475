"""The ledger's file: written rounds are read, damage is named, and a file that was cut short is reported."""

import dataclasses
import functools
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

import hiso_jax
from hiso_jax import fed
from hiso_jax.fed.ledger import LEDGER, delta_of, frames, load_delta, lock, run_store, save_delta
from hiso_jax.fed.ledger.storage import environment
from hiso_jax.fed.run import restore
from tests.callbacks import StopAt
from tests.fed.problems import assert_trees_identical, digits_population, linear_task

ROUNDS = 20
TX = hiso_jax.hiso(0.02)
FORWARD, LINK = fed.LogNormal(0.01, 0.5), fed.LogNormal(1e5, 1.0)


def simulation(
    storage=None, *, stop_at=None, participation=None, rounds=ROUNDS, tx=TX, rounds_per_dispatch=1, mesh=None, **numbers
):
    # Each round is one dispatch, so that a run can be stopped after any round.
    config = fed.SimulationConfig(
        rounds=rounds,
        cohort=4,
        perturbations=2,
        batch_size=8,
        eval_every=5,
        rounds_per_dispatch=rounds_per_dispatch,
        **numbers,
    )
    run = fed.Simulation(
        linear_task(), tx, digits_population(), config, storage=storage, participation=participation, mesh=mesh
    )
    if stop_at is not None:
        run.callbacks = (StopAt(stop_at),)
    return run


@functools.cache
def finished():
    """A finished run, and its directory's files."""
    import tempfile
    from pathlib import Path

    folder = Path(tempfile.mkdtemp()) / "run"
    return simulation(fed.Storage(folder, {"name": "a test"}, snapshot_every=8)).run(), folder


@pytest.fixture
def folder(tmp_path):
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(finished()[1], tmp_path / "run")


def test_what_is_written_is_read(folder):
    result, ledger = finished()[0], fed.load(folder)
    for name, column in result.records._asdict().items():
        if name == "seed_key":
            assert (jax.random.key_data(column) == jax.random.key_data(ledger.seed_key)).all()
        else:
            np.testing.assert_array_equal(column, getattr(ledger.records, name))
    assert ledger.header["about"] == {"name": "a test"}
    assert ledger.header["config"]["perturbations"] == 2
    assert ledger.header["params"] == [["['bias']", [10], "float32"], ["['weight']", [64, 10], "float32"]]
    assert ledger.seal["params_sha256"] == fed.fingerprint(result.params)
    assert (ledger.seal["rounds"], ledger.seal["head"]) == (ROUNDS, ledger.heads[ROUNDS].hex())
    assert ledger.evaluations[1:] == result.metrics[1:]
    rebuilt = fed.replay(result.initial_params, TX, ledger.records)
    assert_trees_identical((result.params, result.state), rebuilt)
    assert ledger.records.bytes_down.sum() == result.traffic["bytes_down"]


def test_the_format_is_what_its_document_says(folder, repository, monkeypatch):
    """The reader in docs/reference/formats.md runs as printed, and needs only the standard library and NumPy."""
    document = (repository / "docs" / "reference" / "formats.md").read_text()
    reader = document.split("```python\n")[1].split("```")[0]
    assert "hiso_jax" not in reader
    monkeypatch.chdir(folder)
    found = {}
    exec(reader, found)
    np.testing.assert_array_equal([row["aggregate"] for row in found["rows"]], finished()[0].records.aggregate)


def test_every_flipped_bit_of_a_sealed_ledger_is_found(folder):
    path = folder / LEDGER
    content, rng = path.read_bytes(), np.random.default_rng(0)
    named = 0
    for bit in rng.integers(0, 8 * len(content), 700):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"refused|not a ledger") as error:
            fed.load(path)
        named += "round" in str(error.value)
    assert named > 350


def test_a_flip_is_named_by_its_rounds(tmp_path):
    """A dispatch of rounds is one frame."""
    storage = fed.Storage(tmp_path / "run", snapshot_every=0)
    simulation(storage, rounds_per_dispatch=None).run()
    path = tmp_path / "run" / LEDGER
    content = bytearray(path.read_bytes())
    layout = fed.load(path).rows.dtype
    *_, frame = [frame for frame in frames.read_frames(bytes(content)) if frame.kind == b"RNDS"]
    rounds = len(frame.payload) // layout.itemsize
    assert rounds > 1
    content[frame.end - 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"its frame of rounds {ROUNDS - rounds} to {ROUNDS - 1} was altered"):
        fed.load(path)


def test_a_flip_is_named_by_its_round(folder):
    path = folder / LEDGER
    content = bytearray(path.read_bytes())
    ends = [frame.end for frame in frames.read_frames(bytes(content)) if frame.kind == b"RNDS"]
    content[ends[6] + 40] ^= 1  # in the payload of the next frame, round 7
    path.write_bytes(content)
    for unfinished in (False, True):
        with pytest.raises(ValueError, match="round 7 was altered: its SHA-256"):
            fed.load(path, unfinished=unfinished)


def test_every_cut_of_a_sealed_ledger_is_found(folder):
    path = folder / LEDGER
    content, rng = path.read_bytes(), np.random.default_rng(1)
    for end in rng.integers(0, len(content), 300):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"no seal, and ends after \d+ rounds|not a ledger"):
            fed.load(path)


def test_what_a_kill_leaves_of_a_frame_is_dropped(folder, caplog):
    path = folder / LEDGER
    content = path.read_bytes()
    ends = [frame.end for frame in frames.read_frames(content) if frame.kind == b"RNDS"]
    for torn in (b"", content[ends[6] : ends[6] + 7], content[ends[6] : ends[7] - 1], bytes(500)):
        path.write_bytes(content[: ends[6]] + torn)
        ledger = fed.load(path, unfinished=True)
        assert (len(ledger.rows), ledger.torn, ledger.seal) == (7, len(torn), None)
    # A resumed run reports the dropped bytes.
    shutil.rmtree(folder / "snapshots")
    same(simulation(fed.Storage(folder, resume=True)).run(), finished()[0])
    assert "500 bytes behind its 7 rounds, of a frame that was not written to its end, are dropped" in caplog.text


def test_bytes_behind_the_seal_are_refused(folder):
    path = folder / LEDGER
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(ValueError, match="its seal is followed by bytes that do not belong there"):
        fed.load(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "does not begin as a ledger does"),
        (b"PK\x03\x04 an archive", "does not begin as a ledger does"),
        (b"HiSoLog\x02", "another format than version 1"),
        (b"HiSoLog\x01", "its header is cut short"),
    ],
)
def test_a_file_that_is_no_ledger_is_refused(tmp_path, content, sentence):
    path = tmp_path / LEDGER
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        fed.load(path, unfinished=True)


def test_a_missing_ledger_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        fed.load(tmp_path / "nothing")


def same(first, second):
    assert_trees_identical((first.params, first.state), (second.params, second.state))
    assert [(row.round, row.metrics, row.bytes_down) for row in first.metrics] == [
        (row.round, row.metrics, row.bytes_down) for row in second.metrics
    ]
    assert [row.train_loss for row in first.metrics[1:]] == [row.train_loss for row in second.metrics[1:]]
    assert (first.traffic, first.attendance, first.invalid) == (second.traffic, second.attendance, second.invalid)
    assert first.forward_passes == second.forward_passes


def test_a_run_stopped_and_resumed_is_the_run(tmp_path):
    for stop, snapshots in ((3, 0), (13, 4)):
        folder = tmp_path / str(stop)
        ended = simulation(fed.Storage(folder, snapshot_every=snapshots), stop_at=stop).run()
        assert ended.interrupted
        if snapshots:
            again = simulation(fed.Storage(folder, snapshot_every=snapshots, resume=True), stop_at=stop + 1).run()
            assert (again.rounds, again.interrupted) == (stop + 1, True)
        resumed = simulation(fed.Storage(folder, snapshot_every=snapshots, resume=True)).run()
        same(resumed, finished()[0])
        assert fed.load(folder).seal["params_sha256"] == fed.fingerprint(finished()[0].params)


@pytest.mark.thorough
def test_a_run_stopped_or_extended_between_evaluations_has_the_history_of_one_left_alone(tmp_path):
    for name, first in (("stopped", {"stop_at": 7}), ("extended", {"rounds": 13})):
        storage = fed.Storage(tmp_path / name)
        assert simulation(storage, **first).run().metrics[-1].round in (7, 13)
        resume = fed.Storage(tmp_path / name, resume=True)
        same(simulation(resume).run(), finished()[0])
        # The same holds when the ended run is read once more.
        same(simulation(resume).run(), finished()[0])


@pytest.mark.thorough
def test_clients_are_remembered_over_a_resumption(tmp_path):
    """Absence, dropout and the clock all follow from the ledger."""
    rules = fed.Participation(availability=fed.Bernoulli(0.5), dropout=0.2, fleet=fed.Fleet(FORWARD, LINK, LINK))
    whole = simulation(participation=rules).run()
    simulation(fed.Storage(tmp_path / "run"), stop_at=9, participation=rules).run()
    resumed = simulation(fed.Storage(tmp_path / "run", resume=True), participation=rules).run()
    same(resumed, whole)
    assert resumed.simulated_seconds == pytest.approx(whole.simulated_seconds, rel=1e-12)


def test_a_finished_run_resumes_to_itself(folder):
    before = (folder / LEDGER).read_bytes()
    same(simulation(fed.Storage(folder, resume=True)).run(), finished()[0])
    assert (folder / LEDGER).read_bytes() == before


def test_a_run_that_had_not_begun_begins(tmp_path):
    same(simulation(fed.Storage(tmp_path / "run", resume=True)).run(), finished()[0])


@pytest.mark.thorough
def test_a_diverged_run_resumes_to_its_end(tmp_path):
    diverged = simulation(fed.Storage(tmp_path / "run"), tx=hiso_jax.hiso(1e6)).run()
    assert diverged.diverged_at is not None
    # The file is cut as by a kill between the last round and the seal.
    path = tmp_path / "run" / LEDGER
    content = path.read_bytes()
    path.write_bytes(content[: [frame.end for frame in frames.read_frames(content) if frame.kind == b"RNDS"][-1]])
    again = simulation(fed.Storage(tmp_path / "run", resume=True), tx=hiso_jax.hiso(1e6)).run()
    assert (again.diverged_at, again.rounds) == (diverged.diverged_at, diverged.rounds)
    # The delta holds standard JSON without NaN, whatever the loss was.
    save_delta(delta_of(fed.load(path)), tmp_path / "delta.safetensors")
    assert b"NaN" not in (tmp_path / "delta.safetensors").read_bytes()
    assert fed.load(path).seal["diverged_at"] == diverged.diverged_at


def test_another_run_is_not_continued(folder):
    with pytest.raises(ValueError, match=r"cannot be continued: its mu is 0\.01 now, and was 0\.001"):
        simulation(fed.Storage(folder, resume=True), mu=0.01).run()
    with pytest.raises(ValueError, match="rounds must be at least the 20 that the run has, got 15"):
        simulation(fed.Storage(folder, resume=True), rounds=15).run()
    rules = fed.Participation(dropout=0.5)
    with pytest.raises(ValueError, match="the training data, their partition or who shows up"):
        simulation(fed.Storage(folder, resume=True), participation=rules).run()
    with pytest.raises(ValueError, match="has a ledger already: `resume` continues it"):
        simulation(fed.Storage(folder)).run()


def test_a_ledger_shorter_than_its_snapshot_is_refused(folder):
    path = folder / LEDGER
    content = path.read_bytes()
    ends = [frame.end for frame in frames.read_frames(content) if frame.kind == b"RNDS"]
    path.write_bytes(content[: ends[9]])
    with pytest.raises(ValueError, match="it ends after 10 rounds, and a snapshot was taken after 16"):
        simulation(fed.Storage(folder, resume=True)).run()


def test_a_damaged_snapshot_is_passed_over(folder):
    path = folder / LEDGER
    content = path.read_bytes()
    ends = [frame.end for frame in frames.read_frames(content) if frame.kind == b"RNDS"]
    path.write_bytes(content[: ends[17]])
    damaged = 0
    for file in sorted((folder / "snapshots" / "16" / "arrays").rglob("*")):
        if file.is_file() and file.stat().st_size > 100:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
            damaged += 1
    assert damaged
    same(simulation(fed.Storage(folder, resume=True)).run(), finished()[0])


def test_a_run_has_one_writer(folder):
    code = (
        "import sys, time; from pathlib import Path; from hiso_jax.fed.ledger import lock\n"
        "held = lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="is being written by another process, and a run has one writer"):
            simulation(fed.Storage(folder, resume=True)).run()
    finally:
        other.kill()
        other.wait()
    lock(folder).release()  # the lock ended with its process


@pytest.mark.parametrize(
    ("function", "trouble", "done"),
    [
        ("pwrite", OSError(28, "No space left on device"), 0.5),
        ("pwrite", KeyboardInterrupt(), 0.5),
        ("fsync", OSError(5, "Input/output error"), 1.0),
        ("fsync", KeyboardInterrupt(), 1.0),
        ("fsync", KeyboardInterrupt(), 0.0),
    ],
)
def test_trouble_while_appending_loses_nothing(tmp_path, monkeypatch, function, trouble, done):
    """A disk is full or fails, or an interrupt arrives, when the share ``done`` of a frame has been written."""
    calls, original = [], getattr(os, function)

    def troubled(*given):
        calls.append(given)
        if len(calls) != 16:
            return original(*given)
        if function == "pwrite":
            original(given[0], given[1][: int(done * len(given[1]))], given[2])
        elif done:
            original(*given)
        raise trouble

    monkeypatch.setattr(frames.os, function, troubled)
    with pytest.raises(type(trouble)):
        simulation(fed.Storage(tmp_path / "run", snapshot_every=0)).run()
    monkeypatch.undo()
    ledger = fed.load(tmp_path / "run", unfinished=True)
    assert ledger.torn == 0
    assert 5 < len(ledger.rows) < ROUNDS
    same(simulation(fed.Storage(tmp_path / "run", resume=True)).run(), finished()[0])


def test_a_run_asked_to_stop_before_it_begins_stops():
    run = simulation()
    run.stop()
    assert (run.run().rounds, run.run().rounds) == (0, ROUNDS)


def stopped(directory, **options):
    simulation(fed.Storage(directory, snapshot_every=8), stop_at=13, **options).run()
    return fed.Storage(directory, resume=True)


@pytest.mark.thorough
def test_another_optimizer_is_noticed_by_what_it_leads_to(tmp_path, monkeypatch, caplog):
    storage = stopped(tmp_path / "run")
    # Another version of optax may have other parts, so the digests are not compared.
    here = environment()
    other = {**here, "versions": {**here["versions"], "optax": "0.1"}}
    monkeypatch.setattr("hiso_jax.fed.ledger.same.environment", lambda: other)
    with pytest.raises(ValueError, match="its first 13 rounds lead to other parameters here; its optimizer"):
        simulation(storage, tx=hiso_jax.hiso(0.05)).run()
    # In another environment the reason may be rounding: the run continues and logs a warning.
    monkeypatch.setattr(run_store, "differences", lambda there: ["jaxlib '0.1' there, '0.2' here"])
    assert simulation(storage, tx=hiso_jax.hiso(0.05)).run().rounds == ROUNDS
    assert "goes on, but its first 13 rounds lead to other parameters here: jaxlib '0.1' there" in caplog.text


@pytest.mark.thorough
def test_other_flags_are_refused(tmp_path):
    storage = stopped(tmp_path / "run")
    with (
        jax.threefry_partitionable(False),
        pytest.raises(ValueError, match="jax's flag jax_threefry_partitionable is False now, and was True"),
    ):
        simulation(storage).run()


@pytest.mark.thorough
def test_how_a_run_is_computed_may_change(tmp_path):
    storage = stopped(tmp_path / "run")
    same(
        simulation(storage, rounds_per_dispatch=None, memory_budget=2**28, directions="regenerate").run(), finished()[0]
    )


@pytest.mark.thorough
def test_rounds_before_the_newest_snapshot_are_not_replayed(tmp_path, monkeypatch):
    storage, replayed, original = stopped(tmp_path / "run"), [], restore.replay

    def replay(params, tx, updates, **options):
        replayed.extend(updates.round.tolist())
        return original(params, tx, updates, **options)

    monkeypatch.setattr(restore, "replay", replay)
    same(simulation(storage).run(), finished()[0])
    assert replayed == [8, 9, 10, 11, 12]


@pytest.mark.slow
def test_an_optimizer_with_random_keys_is_kept(tmp_path):
    tx = optax.chain(hiso_jax.hiso(0.02), optax.add_noise(1e-4, 0.5, key=jax.random.key(3)))
    whole = simulation(tx=tx).run()
    resumed = simulation(stopped(tmp_path / "run", tx=tx), tx=tx).run()
    assert resumed.rounds == ROUNDS
    assert fed.fingerprint((resumed.params, resumed.state)) == fed.fingerprint((whole.params, whole.state))


def test_what_json_does_not_know_is_written_all_the_same(tmp_path):
    storage = fed.Storage(tmp_path / "run", {"folder": tmp_path, "rate": float("nan")})
    simulation(storage, mu=np.float32(1e-3)).run()
    header = fed.load(tmp_path / "run").header
    assert header["about"] == {"folder": str(tmp_path), "rate": None}
    assert header["config"]["mu"] == pytest.approx(1e-3)
    simulation(fed.Storage(tmp_path / "run", resume=True), mu=np.float32(1e-3)).run()


@pytest.mark.thorough
def test_time_goes_on_where_it_was(tmp_path):
    directory = tmp_path / "run"
    before = simulation(fed.Storage(directory), stop_at=13).run()
    after = simulation(fed.Storage(directory, resume=True), stop_at=14).run()
    assert after.run_seconds > before.run_seconds > 0
    assert after.timed_rounds == after.rounds == 14
    # The file is cut after round 14: the time after the evaluation of round 13 was not recorded.
    path = directory / LEDGER
    content = path.read_bytes()
    path.write_bytes(content[: [frame.end for frame in frames.read_frames(content) if frame.kind == b"RNDS"][13]])
    ended = simulation(fed.Storage(directory, resume=True)).run()
    assert (ended.rounds, ended.timed_rounds) == (ROUNDS, ROUNDS - 1)


def test_every_flip_and_cut_of_a_delta_is_found(folder, tmp_path):
    path, rng = tmp_path / "delta.safetensors", np.random.default_rng(2)
    save_delta(delta_of(fed.load(folder)), path)
    content = path.read_bytes()
    for bit in rng.integers(0, 8 * len(content), 700):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"its (safetensors header|metadata|tensors?)\b"):
            load_delta(path)
    for end in rng.integers(0, len(content), 300):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match="its safetensors header is damaged"):
            load_delta(path)


def test_a_delta_rebuilds_the_run(folder, tmp_path):
    result, ledger = finished()[0], fed.load(folder)
    size = save_delta(delta_of(ledger), tmp_path / "delta.safetensors")
    assert size == (tmp_path / "delta.safetensors").stat().st_size < 8000
    delta = load_delta(tmp_path / "delta.safetensors")
    params, _ = fed.replay(result.initial_params, TX, delta.updates)
    assert fed.fingerprint(params) == delta.header["params_sha256"] == fed.fingerprint(result.params)
    assert delta.header["base"] == {"trained": fed.fingerprint(result.initial_params), "frozen": None}


@pytest.mark.thorough
def test_a_parameter_of_no_elements_is_kept_in_snapshots(tmp_path):
    base = linear_task()

    def init(key):
        return {**base.model_init(key), "off": jax.numpy.zeros((0, 3)), "none": jax.numpy.zeros(0)}

    task = dataclasses.replace(base, model_init=init)
    config = fed.SimulationConfig(
        rounds=6, cohort=3, perturbations=2, batch_size=4, eval_every=3, rounds_per_dispatch=1
    )

    def run(storage, stop_at=None):
        # Momentum has the parameters' shapes, too.
        tx = optax.chain(hiso_jax.scale_by_hiso(), optax.trace(0.9), optax.scale(-0.01))
        made = fed.Simulation(task, tx, digits_population(), config, storage=storage)
        if stop_at is not None:
            made.callbacks = (StopAt(stop_at),)
        return made.run()

    whole = run(None)
    run(fed.Storage(tmp_path / "run", snapshot_every=2), stop_at=4)
    assert (tmp_path / "run" / "snapshots").is_dir()
    resumed = run(fed.Storage(tmp_path / "run", snapshot_every=2, resume=True))
    assert_trees_identical((resumed.params, resumed.state), (whole.params, whole.state))
