"""A federation over Flower on this machine: two nodes and four rounds, with the commands that users type."""

import importlib.util
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

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


class Grid:
    """A SuperLink whose nodes a test connects and takes away."""

    def __init__(self):
        self.nodes, self.sent, self.replies = {}, [], {}

    def get_nodes(self):
        return [SimpleNamespace(node_id=node, public_key=key) for node, key in self.nodes.items()]

    def push_messages(self, messages):
        first = len(self.sent)
        self.sent += [(each.metadata.dst_node_id, bytes(each.content["hiso"]["bytes"])) for each in messages]
        return [str(number) for number in range(first, len(self.sent))]

    def pull_messages(self, identifiers):
        return [self.replies.pop(each) for each in identifiers if each in self.replies]

    def answer(self, number, content):
        record = {"hiso": {"bytes": content}}
        metadata = SimpleNamespace(reply_to_message_id=str(number), src_node_id=0)
        self.replies[str(number)] = SimpleNamespace(metadata=metadata, content=record, has_content=lambda: True)


@pytest.fixture
def flower(monkeypatch):
    """The module, which looks at once, in a process that Flower would take for a task of its own."""
    from flwr.supercore.task_identity import TaskIdentity

    from hiso_jax.network import flower

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr(flower, "LOOK", 0.0)
    monkeypatch.setattr(flower, "POLL", 0.0)
    return flower


@pytest.mark.parametrize("comes_back_as", [1, 2])
def test_a_client_that_went_away_is_asked_again(monkeypatch, flower, comes_back_as):
    """As another node, or as the same one after it was gone; and its answer is taken once."""
    grid = Grid()
    grid.nodes = {1: b"key"}
    transport = flower.FlowerTransport(grid, {b"key": 7})
    assert transport.online() == {7}
    looks = iter([{}, {comes_back_as: b"key"}])

    def later():
        if len(grid.sent) == 2:
            grid.answer(1, b"answer")
        grid.nodes = next(looks, grid.nodes)
        return Grid.get_nodes(grid)

    monkeypatch.setattr(grid, "get_nodes", later)
    found = list(transport.exchange({7: b"question"}, time.monotonic() + 20))
    assert found == [(7, b"answer")]
    assert grid.sent == [(1, b"question"), (comes_back_as, b"question")]
    assert not transport._owed


def test_all_that_it_owes_is_asked_again(monkeypatch, flower):
    """Also an answer to an exchange before, of an asynchronous run."""
    grid = Grid()
    grid.nodes = {1: b"key"}
    transport = flower.FlowerTransport(grid, {b"key": 7})
    transport.online()
    # The first exchange ends before its answer comes.
    assert list(transport.exchange({7: b"first"}, time.monotonic())) == []
    looks = iter([{}, {2: b"key"}])

    def later():
        for number in range(2, len(grid.sent)):
            grid.answer(number, b"to " + grid.sent[number][1])
        grid.nodes = next(looks, grid.nodes)
        return Grid.get_nodes(grid)

    monkeypatch.setattr(grid, "get_nodes", later)
    found = list(transport.exchange({7: b"second"}, time.monotonic() + 20, waiting=[7]))
    assert sorted(found) == [(7, b"to first"), (7, b"to second")]
    assert sorted(grid.sent[2:]) == [(2, b"first"), (2, b"second")]


def test_a_client_that_stays_is_asked_once(flower):
    grid = Grid()
    grid.nodes = {1: b"key", 2: b"other"}
    transport = flower.FlowerTransport(grid, {b"key": 7, b"other": 8})
    transport.online()
    asked = transport.exchange({7: b"a", 8: b"b"}, time.monotonic() + 20)
    grid.answer(0, b"one")
    assert next(asked) == (7, b"one")
    grid.answer(1, b"two")
    assert list(asked) == [(8, b"two")]
    assert len(grid.sent) == 2
