"""Kill clients and the server of a federation at random, tear files and lose disks: the run ends as if nothing was.

    python -m tests.network.kills --kills 200

Server and clients are processes of their own, which speak through sockets of this machine. SIGKILL ends one of them at
a random time, and it is started again; every fifth time a client's state is also torn or deleted. The transport asks a
client again that went away, within the deadline, so that the same answers come, and the parameters at the end must be
those of the run without kills, to the bit. It ends with an error if they are not.
"""

import argparse
import json
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from queue import Empty, Queue

import numpy as np

import hiso_jax
from hiso_jax import fed, network
from hiso_jax.network.client_files import STATE
from tests.fed.problems import digits_population, linear_task

CLIENTS, LENGTH = 3, struct.Struct("<Q")


def parts(rounds):
    config = fed.SimulationConfig(rounds=rounds, cohort=CLIENTS, batch_size=8, perturbations=16, eval_every=rounds)
    return network.parts(linear_task(), hiso_jax.mosaic(0.05), config)


def data_of(client):
    population, train = digits_population(CLIENTS), linear_task().train
    rows = np.asarray(population.indices)[population.offsets[client] : population.offsets[client + 1]]
    return {name: np.asarray(column)[rows] for name, column in train.items()}


class Sockets:
    """Clients behind sockets of this machine, asked again if they go away."""

    def __init__(self, folder):
        self.paths = {client: folder / f"socket{client}" for client in range(CLIENTS)}

    def online(self):
        # A client that was killed comes back: it is asked all the same.
        return set(self.paths)

    def exchange(self, outbox, until):
        answers, asking = Queue(), 0
        while outbox or asking:
            for client in list(outbox):
                asking += 1
                given = client, outbox.pop(client), until, answers
                threading.Thread(target=self._ask, args=given, daemon=True).start()
            try:
                client, answer = answers.get(timeout=max(until - time.monotonic(), 0.01))
            except Empty:
                return
            asking -= 1
            if answer is not None:
                yield client, answer

    def _ask(self, client, message, until, answers):
        while time.monotonic() < until:
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                    connection.settimeout(max(until - time.monotonic(), 0.1))
                    connection.connect(str(self.paths[client]))
                    connection.sendall(LENGTH.pack(len(message)) + message)
                    reader = connection.makefile("rb")
                    (length,) = LENGTH.unpack(reader.read(LENGTH.size))
                    answer = reader.read(length)
                    if len(answer) == length:
                        return answers.put((client, answer))
            except (OSError, struct.error):
                time.sleep(0.05)
        answers.put((client, None))


def serve(folder, rounds):
    run, made = folder / "run", parts(rounds)
    storage = fed.Storage(run, resume=(run / "ledger.hiso").exists())
    settings = network.NetworkSettings(deadline=120.0)
    network.Server(made, Sockets(folder), clients=CLIENTS, network=settings, storage=storage).run()


def join(folder, client, rounds):
    made = parts(rounds)
    network.work(
        network.Client(folder / f"state{client}", data_of(client), lambda about: made, client),
        folder / f"socket{client}",
        lambda line: None,
    )


def started(folder, rounds, role, client=0):
    words = [sys.executable, "-m", "tests.network.kills", "--role", role, "--folder", str(folder)]
    words += ["--rounds", str(rounds), "--client", str(client)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=(folder / f"{role}{client}.log").open("ab"))


def rounds_of(folder):
    try:
        return len(fed.load(folder / "run", unfinished=True).rows)
    except (ValueError, OSError):
        return 0


def drive(kills, rounds, seed):
    chance, counts = random.Random(seed), {"server": 0, "client": 0, "torn": 0, "lost": 0}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        clients = {client: started(folder, rounds, "client", client) for client in range(CLIENTS)}
        server, done = started(folder, rounds, "server"), 0
        while server.poll() is None:
            if done < kills:
                # A kill falls after some progress, and before the run's last hundred rounds.
                before, patience = rounds_of(folder), time.monotonic() + 60
                while rounds_of(folder) == before and server.poll() is None and time.monotonic() < patience:
                    time.sleep(chance.random() * 0.2)
                time.sleep(chance.random() * 0.3)
                if server.poll() is not None:
                    break
                done += 1
                if chance.random() < 0.3:
                    server.send_signal(signal.SIGKILL)
                    server.wait()
                    server = started(folder, rounds, "server")
                    counts["server"] += 1
                else:
                    client = chance.randrange(CLIENTS)
                    clients[client].send_signal(signal.SIGKILL)
                    clients[client].wait()
                    counts["client"] += 1
                    state = folder / f"state{client}" / STATE
                    if chance.random() < 0.2 and state.exists():
                        if chance.random() < 0.5:
                            state.write_bytes(state.read_bytes()[: chance.randrange(1, state.stat().st_size)])
                            counts["torn"] += 1
                        else:
                            state.unlink()
                            counts["lost"] += 1
                    clients[client] = started(folder, rounds, "client", client)
            time.sleep(0.05)
        for each in clients.values():
            each.kill()
        if server.returncode:
            raise SystemExit((folder / "server0.log").read_text()[-2000:])
        ledger = fed.load(folder / "run")
        here = network.InProcess({n: network.Client(None, data_of(n), lambda about: parts(rounds), n) for n in clients})
        undisturbed = network.Server(parts(rounds), here, clients=CLIENTS).run()
        found = {
            "kills": done,
            **counts,
            "rounds": len(ledger.rows),
            "answers missing": int((ledger.records.attendance != 3).sum()),
            "seconds": round(time.monotonic() - begin),
            "equal": ledger.seal["params_sha256"] == fed.fingerprint(undisturbed.params),
        }
    print(json.dumps(found))
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2_500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--role", choices=["drive", "server", "client"], default="drive")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--client", type=int, default=0)
    given = parser.parse_args()
    if given.role == "server":
        serve(given.folder, given.rounds)
    elif given.role == "client":
        join(given.folder, given.client, given.rounds)
    else:
        found = drive(given.kills, given.rounds, given.seed)
        sys.exit(0 if found["equal"] and not found["answers missing"] else 1)


if __name__ == "__main__":
    main()
