"""The same work by what people would pick instead: rounds a second, seconds to the first round, memory, lines.

    python benchmarks/peers.py                        # everything that can be set up here, half an hour
    python benchmarks/peers.py --works mnist,es --peers flower,shardes
    python benchmarks/peers.py --authors-checkout DeComFL   # github.com/ZidongLiu/DeComFL, for the works decomfl-…

Each peer gets an environment of its own, made by pip. Its program is in ``peer_programs`` and prints a line after every
round. A run ends some seconds after its first line; the runs of one work take turns. Rounds a second are counted from
the first line to the last, so that they leave out imports and compiling, which are in the seconds to the first round.
Memory is the largest sum of the proportional set sizes of all processes of a run. The lines are those of the program
and of the files that it imports from ``peer_programs``, without comments and blank lines. Data are random and of the
real shapes: the cost of a round does not depend on them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

PROGRAMS = Path(__file__).parent / "peer_programs"
MARK = "HISO_JAX_PEER_RUN"


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      works: mnist and cifar (FedAvg), decomfl-1-8, decomfl-5-8 and decomfl-1-64 (local steps, cohort), es;
        comma-separated.
      peers: flower, pfl, blazefl, authors, shardes; comma-separated. Ours is always there.
      folder: where environments and data are made, and found again.
      authors_checkout: a checkout of the authors' code; without it the works decomfl-… are left out.
      python312: an interpreter of Python 3.12 for BlazeFL and shardes, which need it.
      torch: the requirement by which PyTorch is installed for the peers.
      seconds: the length of a run behind its first round.
      turns: how often each program takes its turn.
      out: JSON file to write.
    """

    works: str = "mnist,cifar,decomfl-1-8,decomfl-5-8,decomfl-1-64,es"
    peers: str = "flower,pfl,blazefl,authors,shardes"
    folder: Path = Path("runs/peers")
    authors_checkout: Path | None = None
    python312: str = "python3.12"
    torch: str = "torch"
    seconds: float = 12.0
    turns: int = 3
    out: Path = Path("benchmarks/results/peers.json")


class Peer(NamedTuple):
    """How the environment of a peer is made: packages, and whether it needs Python 3.12."""

    packages: tuple[str, ...]
    needs_312: bool = False


class Entry(NamedTuple):
    """A program in a work: its name in the table, whose environment, its file, and settings of its own."""

    name: str
    peer: str
    program: str
    setting: dict[str, Any]


def peers(torch: str) -> dict[str, Peer]:
    return {
        "flower": Peer(("flwr[simulation]>=1.42,<1.43", torch)),
        "pfl": Peer(("pfl", torch)),
        "blazefl": Peer(("blazefl", "numpy", "tqdm", torch), needs_312=True),
        "authors": Peer(("numpy", "tqdm", torch)),
        "shardes": Peer(("shardes",), needs_312=True),
    }


FEDAVG = (
    Entry("Flower", "flower", "flower_fedavg.py", {"cpus_per_client": 1}),
    Entry("pfl", "pfl", "pfl_fedavg.py", {}),
    Entry("BlazeFL", "blazefl", "blazefl_fedavg.py", {"threads": 0}),
    Entry("BlazeFL, threads", "blazefl", "blazefl_fedavg.py", {"threads": 2}),
    Entry("fed_avg", "ours", "ours.py", {"method": "fed_avg"}),
    Entry("local_mosaic", "ours", "ours.py", {"method": "local_mosaic"}),
    Entry("mosaic, one step", "ours", "ours.py", {"method": "mosaic", "local_steps": 1}),
)
DECOMFL = (
    Entry("the authors' code", "authors", "authors_decomfl.py", {}),
    Entry("decomfl", "ours", "ours.py", {"method": "decomfl"}),
)
ES = (Entry("shardes", "shardes", "shardes_es.py", {}), Entry("zo.step", "ours", "ours_es.py", {}))
MNIST = {"network": "mnist", "clients": 100, "examples": 320, "batch": 32, "rate": 0.05}


def works() -> dict[str, tuple[dict[str, Any], tuple[Entry, ...]]]:
    """Work → (its setting, its programs)."""
    cifar = {"network": "cifar", "clients": 1000, "examples": 50, "cohort": 50, "batch": 10, "local_steps": 5}
    federations = {
        f"decomfl-{steps}-{cohort}": (
            {**MNIST, "cohort": cohort, "local_steps": steps, "perturbations": 5, "rate": 1e-3},
            DECOMFL,
        )
        for steps, cohort in ((1, 8), (5, 8), (1, 64))
    }
    return {
        "mnist": ({**MNIST, "cohort": 10, "local_steps": 10}, FEDAVG),
        "cifar": ({**cifar, "rate": 0.1}, FEDAVG),
        **federations,
        "es": ({"network": "mnist", "population": 64, "batch": 128, "rate": 0.01}, ES),
    }


def data_of(network: str, folder: Path) -> Path:
    """Random images and labels of MNIST's or CIFAR-10's shape."""
    file = folder / f"{network}.npz"
    if not file.exists():
        rng, (count, shape) = np.random.default_rng(0), DATA[network]
        images = rng.standard_normal((count, *shape), np.float32)
        np.savez(file, images=images, labels=rng.integers(0, 10, count).astype(np.int32))
    return file


DATA = {"mnist": (32_000, (28, 28, 1)), "cifar": (50_000, (32, 32, 3))}


def interpreter_of(name: str, peer: Peer, arguments: Arguments) -> Path | None:
    """The interpreter of a peer's environment, which is made if it is not there; None if that fails."""
    place = (arguments.folder / "environments" / name).absolute()
    python, done = place / "bin" / "python", place / "installed"
    if done.exists():
        return python
    base = shutil.which(arguments.python312) if peer.needs_312 else sys.executable
    if base is None:
        print(f"{name} is left out: it needs Python 3.12, and there is no {arguments.python312}")
        return None
    # Outside this environment, whose packages are not the peer's.
    base = str(Path(base).resolve()) if peer.needs_312 else getattr(sys, "_base_executable", base)
    shutil.rmtree(place, ignore_errors=True)
    begin = time.perf_counter()
    made = subprocess.run([base, "-m", "venv", place], capture_output=True, text=True)
    if made.returncode == 0:
        made = subprocess.run([python, "-m", "pip", "install", "-q", *peer.packages], capture_output=True, text=True)
    if made.returncode:
        print(f"{name} is left out: {(made.stderr or made.stdout).strip().splitlines()[-1]}")
        return None
    done.write_text(json.dumps({"seconds": time.perf_counter() - begin}))
    return python


def marked(mark: str) -> Iterator[int]:
    """The processes whose environment has the mark, wherever they moved."""
    needle = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if needle in (entry / "environ").read_bytes():
                    yield int(entry.name)
            except OSError:
                continue


def memory_of(mark: str) -> int:
    """The sum of the proportional set sizes of a run's processes, in bytes."""
    total = 0
    for pid in marked(mark):
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total


def measured(python: Path | str, entry: Entry, setting: dict[str, Any], arguments: Arguments) -> dict[str, Any]:
    """A run of a program, ended some seconds after its first round."""
    mark = uuid.uuid4().hex
    paths = [str(PROGRAMS), str(Path(__file__).parents[1])]
    if entry.peer == "authors":
        paths.append(str(arguments.authors_checkout.absolute()))
    environment = {**os.environ, MARK: mark, "PYTHONPATH": os.pathsep.join(paths), "RAY_DISABLE_DASHBOARD": "1"}
    lines, peak, over = [], [0], threading.Event()
    begin = time.perf_counter()
    run = subprocess.Popen(
        [python, PROGRAMS / entry.program, json.dumps({**setting, **entry.setting})],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    tail: list[str] = []

    def read() -> None:
        for line in run.stdout:
            if line.startswith("ROUND "):
                lines.append((time.perf_counter() - begin, int(line.split()[1])))

    def watch() -> None:
        while not over.wait(0.5):
            peak[0] = max(peak[0], memory_of(mark))

    threads = [threading.Thread(target=each, daemon=True) for each in (read, watch)]
    threads.append(threading.Thread(target=lambda: tail.extend(run.stderr), daemon=True))
    for thread in threads:
        thread.start()
    while run.poll() is None and (len(lines) < 2 or time.perf_counter() - begin - lines[0][0] < arguments.seconds):
        time.sleep(0.05)
    peak[0] = max(peak[0], memory_of(mark))
    over.set()
    for pid in list(marked(mark)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    run.wait()
    threads[0].join(5)
    if len(lines) < 2:
        raise RuntimeError(f"{entry.name} made {len(lines)} rounds: {''.join(tail)[-400:]}")
    (first, number), (last, reached) = lines[0], lines[-1]
    return {"rounds_per_second": (reached - number) / (last - first), "first_round": first, "peak_bytes": peak[0]}


def code_lines(program: str) -> int:
    """Lines of code of a program and of what it imports beside it, without comments and blank lines."""
    text = (PROGRAMS / program).read_text()
    own = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return len(own) + (code_lines("torch_networks.py") if "from torch_networks" in text else 0)


def main(arguments: Arguments) -> None:
    asked, console, known = arguments.peers.split(","), Console(), works()
    data_folder = arguments.folder / "data"
    data_folder.mkdir(parents=True, exist_ok=True)
    pythons: dict[str, Path | str | None] = {"ours": sys.executable}
    # Works that are not measured now are kept.
    found: dict[str, Any] = json.loads(arguments.out.read_text())["works"] if arguments.out.exists() else {}
    for work in arguments.works.split(","):
        setting, entries = known[work]
        here = []
        for entry in entries:
            if entry.peer not in ("ours", *asked) or (entry.peer == "authors" and arguments.authors_checkout is None):
                continue
            if entry.peer not in pythons:
                pythons[entry.peer] = interpreter_of(entry.peer, peers(arguments.torch)[entry.peer], arguments)
            if pythons[entry.peer] is not None:
                here.append(entry)
        data = str(data_of(setting["network"], data_folder).absolute())
        runs: dict[str, list[dict[str, Any]]] = {entry.name: [] for entry in here}
        for turn in range(arguments.turns):
            for entry in here:
                one = measured(pythons[entry.peer], entry, {**setting, "rounds": 10**6, "data": data}, arguments)
                runs[entry.name].append(one)
                console.print(f"{work}, turn {turn + 1}: {entry.name} {one['rounds_per_second']:.3g} rounds/s")
        found[work] = {
            "setting": setting,
            "entries": {
                entry.name: {
                    **{figure: median(run[figure] for run in runs[entry.name]) for figure in runs[entry.name][0]},
                    "runs": runs[entry.name],
                    "lines": code_lines(entry.program),
                }
                for entry in here
            },
        }
        show(console, work, found[work])
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"cpus": os.cpu_count(), "works": found}, indent=2) + "\n")


def show(console: Console, work: str, measured_work: dict[str, Any]) -> None:
    view = Table(title=f"{work}: {measured_work['setting']}", title_justify="left")
    columns = ("program", "rounds/s", "least to most", "seconds to the first", "peak memory (MB)", "lines")
    for column in columns:
        view.add_column(column, justify="left" if column == "program" else "right")
    for name, row in measured_work["entries"].items():
        speeds = [run["rounds_per_second"] for run in row["runs"]]
        view.add_row(
            name,
            f"{row['rounds_per_second']:.3g}",
            f"{min(speeds):.3g} to {max(speeds):.3g}",
            f"{row['first_round']:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            str(row["lines"]),
        )
    console.print(view)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
