"""A federation over Flower on this machine: its accuracy, seconds a round, and bytes, beside a simulation's.

    pip install '.[flower]' && python benchmarks/federation.py --nodes 4 --rounds 24
    python benchmarks/federation.py --tls                     # with certificates, and keys that are registered
    python benchmarks/federation.py --buffer 2 --rounds 48    # asynchronous: a round takes two answers

The server is ``hiso-jax serve``, the clients are ``hiso-jax join``, each a process with a SuperNode of its own. A proxy
between the nodes and the SuperLink counts bytes. The bytes of this package's messages are those that the clients tell;
the rest is Flower's envelope. The same run without a network follows, with the same clients in one process: its
parameters are to be equal to the bit. ``--kill`` ends a client's process with SIGKILL after that round and starts it
again two rounds later.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console

from hiso_jax import fed, network, tasks
from hiso_jax.network.study import experiment_of, read_study

COMMAND = Path(sys.executable).with_name("hiso-jax")


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      nodes: clients, all of which are invited to every round.
      rounds: rounds.
      algorithm: the method.
      tls: make certificates and keys, and register the keys.
      kill: the round after which a client is killed; 0 kills none.
      buffer: answers that a round takes, in an asynchronous run, which no run in one process repeats; 0 takes all.
      held_out: the share of its examples that every client keeps for evaluation; 0 evaluates on the server.
      deadline: seconds that a client has to answer.
      out: JSON file to write.
    """

    nodes: int = 4
    rounds: int = 24
    algorithm: str = "mosaic"
    tls: bool = False
    kill: int = 0
    buffer: int = 0
    held_out: float = 0.0
    deadline: float = 60.0
    out: Path = Path("benchmarks/results/federation.json")


class Proxy:
    """Forwards connections to a port, and counts their bytes."""

    def __init__(self, port: int) -> None:
        self.up = self.down = 0
        self._port, self._listener = port, socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            node, _ = self._listener.accept()
            try:
                link = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                node.close()
                continue
            for source, target, name in ((node, link, "up"), (link, node, "down")):
                threading.Thread(target=self._forward, args=(source, target, name), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, name: str) -> None:
        try:
            while part := source.recv(65536):
                setattr(self, name, getattr(self, name) + len(part))
                target.sendall(part)
        except OSError:
            pass
        for each in (source, target):
            each.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def make_certificates(folder: Path, nodes: int) -> None:
    """A root certificate, a certificate for this machine, and a pair of keys for each node."""

    def run(command: str) -> None:
        subprocess.run(shlex.split(command), check=True, cwd=folder, capture_output=True)

    for name in ("ca", "server"):
        run(f"openssl ecparam -name prime256v1 -genkey -noout -out {name}.key")
    run("openssl req -x509 -new -key ca.key -days 30 -subj /CN=root -out ca.crt")
    run("openssl req -new -key server.key -subj /CN=localhost -out server.csr")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    sign = "openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -extfile names"
    run(f"{sign} -out server.pem")
    for node in range(nodes):
        run(f"ssh-keygen -q -t ecdsa -b 384 -N '' -f node{node}")
    lines = [f'{node} = "node{node}.pub"' for node in range(nodes)]
    (folder / "clients.toml").write_text("\n".join(["[clients]", *lines]) + "\n")


def write_study(arguments: Arguments, folder: Path) -> Path:
    path = folder / "study.toml"
    keys = 'keys = "clients.toml"\n' if arguments.tls else ""
    buffer = f"buffer = {arguments.buffer}\n" if arguments.buffer else ""
    path.write_text(
        f'task = "digits"\nalgorithm = "{arguments.algorithm}"\nrounds = {arguments.rounds}\n'
        f"cohort = {arguments.nodes}\neval_every = 4\nmemory_budget = 1\n{buffer}\n"
        f"[network]\nclients = {arguments.nodes}\n"
        f"quorum = {arguments.nodes}\ndeadline = {arguments.deadline}\nheld_out = {arguments.held_out}\n{keys}"
    )
    return path


def write_data(nodes: int, folder: Path) -> dict[int, dict[str, np.ndarray]]:
    train = tasks.digits().train
    population = fed.dirichlet(train["label"], nodes, alpha=0.5)
    held, offsets = np.asarray(population.indices), np.asarray(population.offsets)
    found = {}
    for node in range(nodes):
        rows = held[offsets[node] : offsets[node + 1]]
        found[node] = {name: np.asarray(column)[rows] for name, column in train.items()}
        np.savez(folder / f"node{node}.npz", **found[node])
    return found


def started(words: list[str], log: Path, on_line: Callable[[str], None] = lambda line: None) -> subprocess.Popen:
    process = subprocess.Popen(
        [str(COMMAND), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )

    def follow() -> None:
        with log.open("a") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                on_line(line)

    threading.Thread(target=follow, daemon=True).start()
    return process


def main(arguments: Arguments) -> None:
    console = Console()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if arguments.tls:
            make_certificates(folder, arguments.nodes)
        study, data = write_study(arguments, folder), write_data(arguments.nodes, folder)
        port = free_port()
        proxy = Proxy(port)
        begin = time.perf_counter()
        secure = ["--certificates", place] if arguments.tls else []
        server = started(
            ["serve", str(study), "--out", str(folder / "run"), "--port", str(port), *secure], folder / "serve"
        )

        def joined(node: int) -> subprocess.Popen:
            words = [
                "join",
                f"127.0.0.1:{proxy.port}",
                "--data",
                str(folder / f"node{node}.npz"),
                "--client",
                str(node),
            ]
            words += ["--folder", str(folder / f"state{node}")]
            words += (
                ["--certificates", str(folder / "ca.crt"), "--key", str(folder / f"node{node}")]
                if arguments.tls
                else []
            )
            return started(words, folder / f"join{node}")

        clients = {node: joined(node) for node in range(arguments.nodes)}
        killed_at = None
        while server.poll() is None:
            time.sleep(0.2)
            lines = (folder / "join0").read_text().splitlines()
            rounds = sum(" answer of " in line for line in lines)
            if arguments.kill and killed_at is None and rounds > arguments.kill:
                os.killpg(clients[1].pid, signal.SIGKILL)
                killed_at = rounds
            if killed_at is not None and rounds >= killed_at + 2 and clients[1].poll() is not None:
                clients[1] = joined(1)
        seconds = time.perf_counter() - begin
        for each in clients.values():
            each.send_signal(signal.SIGTERM)
        for each in clients.values():
            each.wait()
        if server.returncode:
            raise RuntimeError((folder / "serve").read_text()[-2000:])
        ledger = fed.load(folder / "run")
        ours_up = ours_down = 0
        for node in range(arguments.nodes):
            for came, sent in re.findall(r": ([\d,]+) bytes came, \w+ of (\d+)", (folder / f"join{node}").read_text()):
                ours_up, ours_down = ours_up + int(sent), ours_down + int(came.replace(",", ""))
        visits = int((ledger.records.attendance > 0).sum())
        found = {
            "nodes": arguments.nodes,
            "rounds": len(ledger.rows),
            "tls": arguments.tls,
            "killed_after": arguments.kill,
            "buffer": arguments.buffer,
            "held_out": arguments.held_out,
            "reported": int((ledger.records.attendance == 3).sum()),
            "accuracy": ledger.evaluations[-1].metrics["accuracy"],
            "seconds": seconds,
            "seconds_a_round": [float(each) for each in ledger.records.seconds],
            "bytes": {"up": proxy.up, "down": proxy.down, "ours_up": ours_up, "ours_down": ours_down},
            "bytes_a_visit": {
                name: value / visits
                for name, value in {
                    "up": proxy.up,
                    "down": proxy.down,
                    "ours_up": ours_up,
                    "ours_down": ours_down,
                }.items()
            },
            "params_sha256": ledger.seal["params_sha256"],
        }
        if ledger.records.version is not None:
            ages = ledger.records.round[:, None] - ledger.records.version
            found["staleness"] = {"mean": float(ages.mean()), "most": int(ages.max())}
        experiment = experiment_of(read_study(study))
        parts = network.parts_of(experiment, arguments.held_out)
        here = network.InProcess(
            {node: network.Client(None, own, lambda about: parts, node) for node, own in data.items()}
        )
        result = network.Server(parts, here, clients=arguments.nodes).run()
        found["in_process"] = {
            "accuracy": result.metrics[-1].metrics["accuracy"],
            "equal": fed.fingerprint(result.params) == found["params_sha256"],
        }
        params, _ = fed.replay(result.initial_params, parts.algorithm, ledger.records)
        found["replay_equal"] = fed.fingerprint(params) == found["params_sha256"]
    console.print(found)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    arguments.out.write_text(json.dumps([*known, found], indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
