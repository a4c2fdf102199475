"""A federation over Flower on this machine: two nodes and four rounds, with the commands that users type."""

import importlib.util
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hiso_jax import fed, network
from hiso_jax.network.study import experiment_of, read_study
from tests.fed.problems import digits_population, digits_task

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="the extra flower is not installed"),
]
CLIENTS = 2


def command(*words, **given):
    words = [str(Path(sys.executable).with_name("hiso-jax")), *map(str, words)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **given)


def test_a_federation_over_flower_has_the_bits_of_the_transport_in_process(tmp_path):
    study = tmp_path / "study.toml"
    study.write_text(
        f'algorithm = "mosaic"\nrounds = 4\ncohort = {CLIENTS}\neval_every = 2\n'
        f"[network]\nclients = {CLIENTS}\nquorum = {CLIENTS}\n"
    )
    population, train = digits_population(CLIENTS), digits_task().train
    data = {}
    for client in range(CLIENTS):
        rows = np.asarray(population.indices)[population.offsets[client] : population.offsets[client + 1]]
        data[client] = {name: np.asarray(column)[rows] for name, column in train.items()}
        np.savez(tmp_path / f"{client}.npz", **data[client])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    server = command("serve", study, "--out", tmp_path / "run", "--port", port)
    clients = [
        command("join", f"127.0.0.1:{port}", "--data", tmp_path / f"{client}.npz", "--client", client, cwd=tmp_path)
        for client in range(CLIENTS)
    ]
    try:
        said, _ = server.communicate(timeout=180)
    finally:
        server.kill()
        for each in clients:
            each.send_signal(signal.SIGTERM)
        told = [each.communicate(timeout=30)[0] for each in clients]
    assert server.returncode == 0, said
    assert all(" answer of 56" in each for each in told), told

    ledger = fed.load(tmp_path / "run")
    assert (ledger.records.attendance == 3).all()
    parts = network.parts_of(experiment_of(read_study(study)))
    here = {client: network.Client(None, own, lambda about: parts, client) for client, own in data.items()}
    result = network.Server(parts, network.InProcess(here), clients=CLIENTS).run()
    assert ledger.seal["params_sha256"] == fed.fingerprint(result.params)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["params_sha256"] == ledger.seal["params_sha256"]
