"""Kill clients, nodes, the server and Flower's engine at random: the run ends as if nothing was.

    python -m tests.network.flower_kills --kills 200

It needs the extra ``flower``. Server and clients are the commands ``hiso-jax serve`` and ``hiso-jax join``; SIGKILL
ends a client, a SuperNode, the server or the SuperLink at a random time. What ended is started again by the command
that a user would type; a SuperNode is started again by its client. Every fifth time a client's state is also torn or
deleted. The parameters at the end must be those of a run in one process in which the same answers came, to the bit, and
its ledger must replay to them. It ends with an error if they are not.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from hiso_jax import fed, network
from hiso_jax.fed.population import REPORTED
from hiso_jax.network.client_files import STATE
from hiso_jax.network.envelope import opened
from hiso_jax.network.study import experiment_of, read_study
from tests.fed.problems import digits_population, digits_task

# Seconds without a round after which the next kill comes all the same.
PATIENCE = 60.0
CLIENTS, COMMAND = 3, Path(sys.executable).with_name("hiso-jax")
VICTIMS = {"client": 5, "node": 2, "server": 2, "engine": 1}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def started(folder, name, words):
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen([str(COMMAND), *map(str, words)], stdout=log, stderr=log)


def processes_of(parent, program):
    """The processes that another started and whose command names a program."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if int(fields[1]) == parent and program in command:
            found.append(int(folder.name))
    return found


def killed(number):
    try:
        os.kill(number, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


class Same(network.InProcess):
    """Clients in this process, of which those answer that answered in another run."""

    def __init__(self, clients, came):
        super().__init__(clients)
        self._there = came

    def exchange(self, outbox, until, waiting=()):
        for client, message in super().exchange(outbox, until):
            number = opened(message).round
            if number >= len(self._there) or client in self._there[number]:
                yield client, message


def rounds_of(run):
    try:
        return len(fed.load(run, unfinished=True).rows)
    except (ValueError, OSError):
        return 0


class Federation:
    """The processes of a federation, and how each is started."""

    def __init__(self, folder, rounds):
        self.folder, self.port, self.run, self.study = folder, free_port(), folder / "run", folder / "study.toml"
        self.study.write_text(
            f'algorithm = "mosaic"\nrounds = {rounds}\ncohort = {CLIENTS}\neval_every = {rounds}\nmemory_budget = 1\n'
            f"[network]\nclients = {CLIENTS}\nquorum = {CLIENTS}\ndeadline = 120\n"
        )
        population, train = digits_population(CLIENTS), digits_task().train
        self.data = {}
        for client in range(CLIENTS):
            rows = np.asarray(population.indices)[population.offsets[client] : population.offsets[client + 1]]
            self.data[client] = {name: np.asarray(column)[rows] for name, column in train.items()}
            np.savez(folder / f"{client}.npz", **self.data[client])
        self.server, self.clients = self.serve(), {client: self.join(client) for client in range(CLIENTS)}

    def serve(self):
        where = ["--resume", self.run] if (self.run / "ledger.hiso").exists() else ["--out", self.run]
        return started(self.folder, "serve", ["serve", self.study, *where, "--port", self.port])

    def join(self, client):
        words = ["join", f"127.0.0.1:{self.port}", "--data", self.folder / f"{client}.npz", "--client", client]
        return started(self.folder, f"join{client}", [*words, "--folder", self.folder / f"state{client}"])

    def keep_serving(self):
        """Start the server again if it ended before its run; return whether the run is over."""
        if self.server.poll() is None:
            return False
        if (self.run / "summary.json").exists() and self.server.returncode == 0:
            return True
        time.sleep(1)
        self.server = self.serve()
        return False

    def kill(self, victim, chance, counts):
        client = chance.randrange(CLIENTS)
        if victim == "client":
            self.clients[client].kill()
            self.clients[client].wait()
            state = self.folder / f"state{client}" / STATE
            if chance.random() < 0.2 and state.exists():
                if chance.random() < 0.5:
                    state.write_bytes(state.read_bytes()[: chance.randrange(1, state.stat().st_size)])
                    counts["torn"] += 1
                else:
                    state.unlink()
                    counts["lost"] += 1
            self.clients[client] = self.join(client)
            return True
        if victim == "server":
            self.server.kill()
            self.server.wait()
            return True
        owner, program = (self.clients[client], "supernode") if victim == "node" else (self.server, "superlink")
        return any([killed(number) for number in processes_of(owner.pid, program)])

    def end(self):
        for each in (*self.clients.values(), self.server):
            each.send_signal(signal.SIGTERM)
        for each in (*self.clients.values(), self.server):
            each.wait(60)


def drive(kills, rounds, seed, pause):
    chance, begin = random.Random(seed), time.monotonic()
    counts = dict.fromkeys([*VICTIMS, "torn", "lost"], 0)
    with tempfile.TemporaryDirectory() as place:
        there, done, told = Federation(Path(place), rounds), 0, begin
        seen, patience, when = 0, time.monotonic() + PATIENCE, None
        while not there.keep_serving():
            time.sleep(0.2)
            if done < kills:
                now = rounds_of(there.run)
                # A kill comes after some progress, and before the last rounds: every one must be made good.
                if when is None and (now > seen or time.monotonic() > patience):
                    when = time.monotonic() + chance.random() * 2 * pause
                if when is not None and time.monotonic() > when and now < rounds - 2:
                    victim = chance.choices(list(VICTIMS), VICTIMS.values())[0]
                    if there.kill(victim, chance, counts):
                        done, counts[victim] = done + 1, counts[victim] + 1
                    seen, patience, when = rounds_of(there.run), time.monotonic() + PATIENCE, None
            if time.monotonic() > told + 60:
                told = time.monotonic()
                print(f"{told - begin:.0f} s: {done} kills, {rounds_of(there.run)} rounds, {counts}", flush=True)
        there.end()
        ledger = fed.load(there.run)
        attended = [
            {int(client) for client, status in zip(row, came, strict=True) if status == REPORTED}
            for row, came in zip(ledger.records.cohort, ledger.records.attendance, strict=True)
        ]
        parts = network.parts_of(experiment_of(read_study(there.study)))
        own = {client: network.Client(None, data, lambda about: parts, client) for client, data in there.data.items()}
        settings = network.NetworkSettings(deadline=0.5)
        result = network.Server(parts, Same(own, attended), clients=CLIENTS, network=settings).run()
        replayed, _ = fed.replay(result.initial_params, parts.algorithm, ledger.records)
        ends = ledger.seal["params_sha256"]
        found = {
            "kills": done,
            **counts,
            "rounds": len(ledger.rows),
            "answers missing": CLIENTS * len(ledger.rows) - sum(map(len, attended)),
            "seconds": round(time.monotonic() - begin),
            "equal": ends == fed.fingerprint(result.params),
            "replay equal": ends == fed.fingerprint(replayed),
        }
    print(json.dumps(found))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, default=4.0, help="mean seconds from a round to a kill")
    given = parser.parse_args()
    found = drive(given.kills, given.rounds, given.seed, given.pause)
    sys.exit(0 if found["equal"] and found["replay equal"] else 1)


if __name__ == "__main__":
    main()
