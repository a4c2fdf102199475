"""Seconds to import the library, and from a command to the ledger's first rounds, with an empty cache and a warm one.

    python benchmarks/start.py

Every measurement is a process of its own, and the commands take turns. A command's first rounds are there when its
ledger grows beyond the header, so that the time has the imports, the data, the compiling and a dispatch of rounds.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro
from rich.console import Console
from rich.table import Table

COMMANDS = {
    "run (HiSo, digits)": "--algorithm hiso --learning-rate 0.02",
    "run --algorithm decomfl": "--algorithm decomfl --learning-rate 0.02",
    "run --algorithm mosaic": "--algorithm mosaic --learning-rate 0.6",
    "run --algorithm local_mosaic": "--algorithm local_mosaic --learning-rate 0.6",
    "run --algorithm fed_avg": "--algorithm fed_avg --learning-rate 0.6",
}
IMPORT = "import time; b = time.perf_counter(); import hiso_jax; hiso_jax.hiso; print(time.perf_counter() - b)"


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      turns: how often everything takes its turn.
      out: JSON file to write.
    """

    turns: int = 3
    out: Path = Path("benchmarks/results/start.json")


def seconds_to_rounds(options: str, cache: Path) -> float:
    """Seconds from the start of the command to the first bytes of rounds in its ledger."""
    with tempfile.TemporaryDirectory() as folder:
        ledger, begin = Path(folder) / "run" / "ledger.hiso", time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "hiso_jax", "run", *options.split(), "--rounds", "100000", "--out", ledger.parent],
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)},
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        header = 0
        try:
            while process.poll() is None:
                size = ledger.stat().st_size if ledger.exists() else 0
                header = header or size
                if size > header:
                    return time.perf_counter() - begin
                time.sleep(0.005)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    sys.exit(f"hiso-jax run {options} ended before its first round")


def main(arguments: Arguments) -> None:
    found: dict[str, list[float]] = {"import hiso_jax": []}
    for _ in range(arguments.turns):
        printed = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout
        found["import hiso_jax"].append(float(printed))
        for name, options in COMMANDS.items():
            with tempfile.TemporaryDirectory() as cache:
                for state in ("empty", "warm"):
                    seconds = seconds_to_rounds(options, Path(cache))
                    found.setdefault(f"{name}, {state} cache", []).append(seconds)
    table = Table(title="Seconds to start")
    for column in ("", "median", "least to most"):
        table.add_column(column, justify="right")
    for name, times in found.items():
        table.add_row(name, f"{median(times):.2f}", f"{min(times):.2f} to {max(times):.2f}")
    Console().print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
