"""Several processes form one run: here two processes with two devices each, connected by gloo."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import hiso_jax
from hiso_jax import fed, tasks
from hiso_jax.fed.ledger import LEDGER, frames

OPTIONS = ["--rounds", "8", "--clients", "20", "--cohort", "5", "--perturbations", "2"]
OPTIONS += ["--learning-rate", "0.02", "--batch-size", "8", "--eval-every", "4"]


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(process, port, out, *, resume=False):
    command = [sys.executable, "-m", "hiso_jax.cli.main", "run"]
    command += ["--resume", str(out)] if resume else [*OPTIONS, "--out", str(out)]
    command += ["--coordinator", f"localhost:{port}", "--num-processes", "2", "--process-id", str(process)]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=out.parent, env=environment, **pipes)


@pytest.mark.thorough
def test_two_processes_of_two_devices_are_one_run(tmp_path):
    out, port = tmp_path / "run", free_port()
    processes = [start(process, port, out) for process in range(2)]
    texts = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts

    # Only the first process writes; the other has the same parameters, and prints their SHA-256.
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rounds"] == 8
    assert (summary["device_count"], summary["process_count"]) == (4, 2)
    assert (summary["mesh"], summary["cohort_per_device"], summary["cohort_padding"]) == (
        {"clients": 4, "model": 1},
        2,
        3,
    )
    assert f"process 1 of 2: after 8 rounds the parameters have SHA-256 {summary['params_sha256']}" in texts[1][0]
    assert "written to" not in texts[1][0]

    # One process with one device replays them bit for bit, and measures the same scalars in the first round.
    records = fed.load(out).records
    task, tx = tasks.digits(), hiso_jax.hiso(0.02)
    initial = task.init(fed.init_key(jax.random.key(0)))
    assert fed.fingerprint(fed.replay(initial, tx, records)[0]) == summary["params_sha256"]
    population = fed.dirichlet(task.train["label"], 20, alpha=0.5)
    config = fed.SimulationConfig(rounds=1, cohort=5, perturbations=2, batch_size=8, eval_every=4)
    alone = fed.Simulation(task, tx, population, config).run().records
    tolerance = 8 * 2**-23 * float(alone.loss[0]) / 1e-3
    np.testing.assert_allclose(records.scalars[0, :, 0], alone.scalars[0, :, 0], atol=tolerance)


@pytest.mark.slow
def test_a_directory_in_the_way_stops_every_process(tmp_path):
    out, port = tmp_path / "run", free_port()
    out.mkdir()
    processes = [start(process, port, out) for process in range(2)]
    texts = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], texts
    assert f"--out must be a directory that does not exist yet; {out} does" in texts[0][1]
    assert "hiso-jax: error: another process failed; see its error message" in texts[1][1]


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on(tmp_path):
    out = tmp_path / "run"
    for resume in (False, True):
        port = free_port()
        processes = [start(process, port, out, resume=resume) for process in range(2)]
        texts = [process.communicate(timeout=240) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], texts
        digest = json.loads((out / "summary.json").read_text())["params_sha256"]
        assert digest in texts[1][0]
        if not resume:
            first, ledger = digest, out / LEDGER
            content = ledger.read_bytes()
            ends = [frame.end for frame in frames.read_frames(content) if frame.kind == b"RNDS"]
            ledger.write_bytes(content[: ends[1]])
    assert "going on after" in texts[0][0]
    assert digest == first
