"""Kill runs at random moments, resume them, and check that they end as if nothing had happened.

    python -m tests.survival --kills 50                       # of digits and of a small language model
    python -m tests.survival --kills 5 --small-disk FOLDER    # FOLDER a file system that is too small for a run

A run is killed (SIGKILL, SIGSTOP and then SIGKILL, SIGTERM, SIGINT or SIGHUP) amid its rounds, or one time in five as
it starts. It is resumed until it ends, one time in four with its lock file removed. Every ledger on the way must be
readable, and the final parameters must be those of an uninterrupted run. The file of a killed export must be whole or
absent.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hiso_jax import fed
from hiso_jax.fed.ledger import LEDGER

COMMAND = [sys.executable, "-m", "hiso_jax.cli.main", "run"]
DIGITS = [
    "--rounds",
    "4000",
    "--eval-every",
    "100",
    "--snapshot-every",
    "700",
    "--clients",
    "50",
    "--cohort",
    "5",
    "--perturbations",
    "3",
]
TEXT = [
    "--rounds",
    "400",
    "--eval-every",
    "50",
    "--snapshot-every",
    "60",
    "--clients",
    "4",
    "--cohort",
    "2",
    "--perturbations",
    "2",
]
DONE, FAILED, KILLED = 0, 1, -signal.SIGKILL
HOW = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# About the longest duration of a dispatch.
DISPATCH_SECONDS = 0.6
# Bytes that a run writes beside its ledger: its options and its evaluations.
ROOM = 32 * 1024


@dataclass
class Case:
    """A run to be killed: its options, and the duration, ledger size and SHA-256 of its uninterrupted twin."""

    name: str
    options: list[str]
    seconds: float = 0.0
    size: int = 0
    sha256: str = ""


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def leave_alone(case: Case, folder: Path) -> None:
    """Run a case to its end without interruption, and record its duration and its result."""
    begin = time.perf_counter()
    process = start([*case.options, "--out", str(folder)])
    errors = process.communicate()[1]
    assert process.returncode == DONE, errors
    case.seconds, case.sha256 = time.perf_counter() - begin, summary(folder)["params_sha256"]
    case.size = size_of(folder)


def size_of(run: Path) -> int:
    """Bytes of a run's ledger, 0 before there is one."""
    ledger = run / LEDGER
    return ledger.stat().st_size if ledger.exists() else 0


def await_moment(process: subprocess.Popen, case: Case, out: Path, chance: random.Random) -> bool:
    """Wait for a moment to kill ``process``; return whether the run had not ended before."""
    if chance.random() < 0.2:
        end, size = time.perf_counter() + chance.uniform(0, case.seconds / 2), 0
    else:
        end, size = 0.0, int(size_of(out) + chance.uniform(0, (case.size - size_of(out)) / 2))
    while time.perf_counter() < end or size_of(out) < size:
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    time.sleep(chance.uniform(0, DISPATCH_SECONDS))
    return process.poll() is None


def strike(process: subprocess.Popen, how: signal.Signals) -> str:
    """End a process with a signal, and return its standard error; SIGSTOP is followed by SIGKILL."""
    process.send_signal(how)
    if how == signal.SIGSTOP:
        time.sleep(0.1)
        process.kill()
    return process.communicate()[1]


def codes_of(how: signal.Signals) -> tuple[int, ...]:
    """Allowed exit codes: a signal may come before the command has begun, or after the last round."""
    return (KILLED,) if how in (signal.SIGKILL, signal.SIGSTOP) else (128 + how, DONE, -how)


def export_killed(case: Case, out: Path, chance: random.Random) -> dict:
    """Kill an export; the delta must be whole or absent, and the next export must be correct."""
    path, how = out / "delta.safetensors", chance.choice(HOW)
    process = subprocess.Popen(
        [*COMMAND[:-1], "export", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    time.sleep(chance.uniform(1, 4))
    errors = strike(process, how)
    # The export may have ended before the signal.
    assert process.returncode in (DONE, *codes_of(how)), (process.returncode, errors)
    there = path.exists()
    if not there:
        again = subprocess.run([*COMMAND[:-1], "export", str(out)], capture_output=True, text=True)
        assert again.returncode == DONE, again.stderr
    assert fed.load_delta(path).header["params_sha256"] == case.sha256
    return {"signal": how.name, "code": process.returncode, "export": there, "rounds": None, "torn": 0, "sealed": True}


def until_done(case: Case, out: Path, chance: random.Random, most_kills: int) -> Iterator[dict]:
    """Kill and resume a run until it has ended, at most ``most_kills`` times; yield the state after every kill."""
    kills = 0
    while True:
        if out.exists() and chance.random() < 0.25:
            (out / ".lock").unlink(missing_ok=True)
        process = start(["--resume", str(out)] if out.exists() else [*case.options, "--out", str(out)])
        how = chance.choice(HOW)
        if kills < most_kills and await_moment(process, case, out, chance):
            errors = strike(process, how)
            kills += 1
            assert process.returncode in codes_of(how), (process.returncode, errors)
            assert "Traceback" not in errors or process.returncode == -how, errors
            found = {"signal": how.name, "code": process.returncode, "rounds": None, "torn": 0, "sealed": False}
            if (out / LEDGER).exists():
                ledger = fed.load(out, unfinished=True)
                found |= {"rounds": len(ledger.rows), "torn": ledger.torn, "sealed": ledger.seal is not None}
                kills = most_kills if found["sealed"] else kills
            yield found
            continue
        errors = process.communicate()[1]
        assert process.returncode == DONE, errors
        return


def survive(case: Case, folder: Path, kills: int, seed: int) -> list[dict]:
    """Kill runs of ``case`` at least ``kills`` times in all; each must end as its uninterrupted twin does."""
    chance, found, number = random.Random(seed), [], 0
    while len(found) < kills:
        out = folder / f"{case.name}-{number}"
        for state in until_done(case, out, chance, kills - len(found)):
            found.append({"case": case.name, "run": number, **state})
            print(json.dumps(found[-1]), flush=True)
        ends = summary(out)["params_sha256"], fed.load(out).seal["params_sha256"]
        if ends != (case.sha256, case.sha256):
            # The folder of all runs is removed at the end, so this run is copied for a look at it.
            kept = shutil.copytree(out, Path(tempfile.mkdtemp()) / out.name)
            raise AssertionError(f"{kept} ended otherwise: summary and seal have {ends}, alone {case.sha256}")
        found.append({"case": case.name, "run": number, **export_killed(case, out, chance)})
        print(json.dumps(found[-1]), flush=True)
        number += 1
        shutil.rmtree(out)
    return found


def fill_up(case: Case, disk: Path, elsewhere: Path, runs: int, seed: int) -> list[dict]:
    """Run ``case`` on a disk that is too small; once moved to a larger disk, it must continue to its end."""
    chance, found = random.Random(seed), []
    for number in range(runs):
        out, moved = disk / f"{case.name}-{number}", elsewhere / f"{case.name}-full-{number}"
        # The room differs every time; by turns the snapshots or the ledger itself do not fit.
        free, options = shutil.disk_usage(disk).free, case.options
        if number % 2:
            room = ROOM + int(chance.uniform(0, 0.8) * (case.size - ROOM))
            options = [*options, "--snapshot-every", "0"]
        else:
            room = int(chance.uniform(0.1, 1) * free)
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(max(free - room, 0)))
        process = start([*options, "--out", str(out)])
        errors = process.communicate()[1]
        assert process.returncode == FAILED, (process.returncode, errors)
        assert errors.count("\n") == 1, errors
        ledger = fed.load(out, unfinished=True) if (out / LEDGER).exists() else None
        found.append(
            {
                "case": case.name,
                "snapshots": options is case.options,
                "rounds": None if ledger is None else len(ledger.rows),
                "says": errors.strip().replace(str(out), "RUN"),
            }
        )
        print(json.dumps(found[-1]), flush=True)
        shutil.copytree(out, moved)
        shutil.rmtree(out)
        process = start(["--resume", str(moved)])
        errors = process.communicate()[1]
        assert process.returncode == DONE, errors
        assert summary(moved)["params_sha256"] == case.sha256
        ballast.unlink()
        shutil.rmtree(moved)
    return found


def cases(folder: Path) -> list[Case]:
    """Digits, and a small language model, all of its parameters."""
    from tests.tasks.text.problems import data_folder, model_folder

    model, data = model_folder(folder / "base"), data_folder(folder / "data")
    words = [
        "--template",
        "{text} It was",
        "--verbalizer",
        " bad, good",
        "--batch-size",
        "8",
        "--learning-rate",
        "1e-3",
        "--trainable",
        "all",
    ]
    text = ["--task", "text-classification", "--model", str(model), "--data-dir", str(data), *words, *TEXT]
    return [Case("digits", DIGITS), Case("language-model", text)]


def main(kills: int = 50, seed: int = 0, small_disk: Path | None = None, out: Path | None = None) -> None:
    """Make ``kills`` kills, half of them in each case, and write the findings to ``out`` as JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), []
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
        for number, case in enumerate(cases(folder)):
            leave_alone(case, folder / f"{case.name}-alone")
            print(f"{case.name}: {case.seconds:.1f} s alone", flush=True)
            if small_disk is None:
                found += survive(case, folder, (kills + number) // 2, seed + number)
            else:
                found += fill_up(case, small_disk, folder, (kills + number) // 2, seed + number)
        within = [state for state in found if state["rounds"] and not state.get("sealed")]
        print(
            f"ended {len(found)} times, {len(within)} of them between its rounds; always resumed to the same parameters"
        )
        assert len(within) >= len(found) / 2
        if out is not None:
            out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
