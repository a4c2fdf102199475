"""Correctness and speed on the accelerator at hand, in minutes: one command for a machine that is lent.

    PYTHONPATH=. python benchmarks/accelerator.py --mnist FOLDER_WITH_IDX_FILES --out OUT
    PYTHONPATH=. python benchmarks/accelerator.py --stages replay,cross --out OUT
    PYTHONPATH=. python benchmarks/accelerator.py --budget 700 --out OUT    # again with the same OUT: the stages left

Every stage is a script of this folder or the test suite. The stages run one after the other, the most telling first,
each in its own processes and with a time limit, so that a stage that fails takes nothing from the others. OUT/STAGE.log
holds the output of a stage, OUT/*.json its figures, and OUT/stages.json how every stage ended. A stage that has ended
well is not run again in the same folder. With a budget no stage runs past it, and a stage that needs more than what is
left waits for the next call, while shorter ones take its place.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

HERE = Path(__file__).parent
PLANNED = ("--clients", "8", "--tokens", "64")


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      stages: comma-separated; by default all, in the order of STAGES.
      mnist: folder with MNIST's IDX files.
      smollm2, reviews: the language model as a GGUF file, and the folder with its reviews; without them the replay of a
        language model is left out.
      workers: processes of the test suite.
      budget: seconds for all stages of this call; None has no limit but those of the stages.
      out: folder for logs and figures.
      worker: run one process of the stage cross.
    """

    stages: str = ""
    mnist: Path | None = None
    smollm2: Path | None = None
    reviews: Path | None = None
    workers: int = 12
    budget: float | None = None
    out: Path = Path("runs/accelerator")
    worker: str = ""


def script(name: str, *words: str) -> list[str]:
    return [sys.executable, str(HERE / f"{name}.py"), *words]


def tests(arguments: Arguments) -> list[list[str]]:
    """The suite's mathematics, rounds, replays and models on the device; each test is reported as it ends."""
    folders = [f"tests/{name}" for name in ("zo", "algorithms", "channels", "fed", "models")]
    return [[sys.executable, "-m", "pytest", "-n", str(arguments.workers), "-v", "--tb=short", *folders]]


def replay(arguments: Arguments) -> list[list[str]]:
    """A run and its replay, to the bit, and how long both take."""
    words = ["--data-dir", str(arguments.mnist)] if arguments.mnist else []
    if arguments.smollm2 is not None and arguments.reviews is not None:
        words += ["--model", str(arguments.smollm2), "--reviews", str(arguments.reviews), "--model-rounds", "50"]
    return [script("replay", *words, "--out", str(arguments.out / "replay.json"))]


def rounds_of_mnist(arguments: Arguments) -> list[list[str]]:
    """Rounds a second of MNIST's CNN."""
    words = ["--data-dir", str(arguments.mnist)] if arguments.mnist else []
    each = {"": ("8,64,1024", "1"), "_local": ("8,64", "5")}
    return [
        script("round_throughput", *words, "--cohorts", cohorts, "--local-steps", steps, "--out",
               str(arguments.out / f"round_throughput{name}.json"))
        for name, (cohorts, steps) in each.items()
    ]  # fmt: skip


def _rounds(arguments: Arguments, name: str, *words: str) -> list[str]:
    return script("llm_round", *words, *PLANNED, "--out", str(arguments.out / f"llm_round_{name}.json"))


def small_model(arguments: Arguments) -> list[list[str]]:
    """OPT-125M in float32: the round that `plan.py` foresees."""
    return [_rounds(arguments, "opt-125m_gaussian", "--repeats", "15")]


def families(arguments: Arguments) -> list[list[str]]:
    """OPT-125M with the other families of directions, each in its cheapest mode."""
    return [
        _rounds(arguments, f"opt-125m_{sampler}", "--sampler", sampler, "--modes", mode, "--repeats", "15")
        for sampler, mode in (("low_rank", "regenerate"), ("rademacher", "keep"), ("binomial", "keep"))
    ]


def middle_model(arguments: Arguments) -> list[list[str]]:
    """OPT-1.3B in bfloat16."""
    words = ("--shape", "opt-1.3b", "--dtype", "bfloat16", "--repeats", "7", "--sampler")
    return [_rounds(arguments, "opt-1.3b_gaussian", *words, "gaussian")]


def large_model(arguments: Arguments) -> list[list[str]]:
    """Llama-7B in bfloat16."""
    words = ("--shape", "llama-7b", "--dtype", "bfloat16", "--curvature-dtype", "bfloat16", "--modes", "regenerate")
    more = ("--repeats", "5", "--sampler")
    return [_rounds(arguments, f"llama-7b_{sampler}", *words, *more, sampler) for sampler in ("gaussian", "low_rank")]


def mezo(arguments: Arguments) -> list[list[str]]:
    """A step beside PyTorch's."""
    return [script("mezo", "--steps", "20", "--turns", "1", "--out", str(arguments.out / "mezo.json"))]


def draws(arguments: Arguments) -> list[list[str]]:
    """Normals a second."""
    return [script("normals", "--millions", "480", "--out", str(arguments.out / "normals.json"))]


def projections(arguments: Arguments) -> list[list[str]]:
    """Projecting a client's progress on directions, and rebuilding it."""
    words = ("--shapes", "mnist,opt-125m-lora,opt-125m", "--counts", "64,512")
    return [script("projection_time", *words, "--out", str(arguments.out / "projection_time.json"))]


def shardes(arguments: Arguments) -> list[list[str]]:
    """Generations a second beside shardes; its environment must be in OUT/peers, or be made from a network."""
    words = ("--works", "es", "--peers", "shardes", "--turns", "2", "--seconds", "8")
    folder, out = arguments.out / "peers", arguments.out / "peers.json"
    return [script("peers", *words, "--folder", str(folder), "--out", str(out))]


CROSSED = {
    "hiso": ("hiso", 0.01, "gaussian"),
    "decomfl_signs": ("decomfl", 0.03, "rademacher"),
}


def cross(arguments: Arguments) -> list[list[str]]:
    """Runs of the digits on this device and on its host's processor, each replayed by both from the same start."""
    lines = []
    for name in CROSSED:
        for where in ("cpu", "device"):
            lines.append([*_on(where), *script("accelerator", *_at(arguments, name, where, "run"))])
            for by in ("cpu", "device"):
                lines.append([*_on(by), *script("accelerator", *_at(arguments, name, where, f"replay by {by}"))])
    return lines


def _on(where: str) -> list[str]:
    return ["JAX_PLATFORMS=cpu"] if where == "cpu" else []


def _at(arguments: Arguments, name: str, where: str, what: str) -> list[str]:
    return ["--worker", f"{name} {where} {what}", "--out", str(arguments.out)]


def worker(arguments: Arguments) -> None:
    """Make one run of the digits, or replay one, and write the result to a file."""
    import jax

    from hiso_jax import algorithms, fed, tasks

    name, where, what, *by = arguments.worker.split()
    folder = arguments.out / "cross"
    folder.mkdir(exist_ok=True)
    method, rate, sampler = CROSSED[name]
    tx = getattr(algorithms, method)(rate, sampler=sampler)
    if what == "run":
        task = tasks.digits()
        population = fed.dirichlet(task.train["label"], 100, alpha=0.5)
        config = fed.SimulationConfig(rounds=1000, cohort=10, eval_every=1000)
        result = fed.Simulation(task, tx, population, config).run()
        records = result.records._replace(seed_key=jax.random.key_data(result.records.seed_key))
        kept = jax.tree.map(np.asarray, (result.initial_params, records, result.params))
        (folder / f"{name}_{where}.pickle").write_bytes(pickle.dumps(kept))
        return
    initial, records, params = pickle.loads((folder / f"{name}_{where}.pickle").read_bytes())
    records = records._replace(seed_key=jax.random.wrap_key_data(records.seed_key))
    found, _ = fed.replay(initial, tx, records)
    leaves = [(np.asarray(a), b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True)]
    row = {
        "run": name,
        "of": where,
        "replayed_by": by[-1],
        "device": jax.devices()[0].device_kind,
        "largest_difference": max(float(np.abs(a - b).max()) for a, b in leaves),
        "numbers_that_differ": sum(int((a != b).sum()) for a, b in leaves),
        "numbers": sum(a.size for a, _ in leaves),
        "largest_number": max(float(np.abs(b).max()) for _, b in leaves),
    }
    with (arguments.out / "cross.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


# In the order in which a loan that ends early leaves the least unknown: (commands, the longest it may take, the least
# that is worth a start), in seconds.
STAGES: dict[str, tuple[Callable[[Arguments], list[list[str]]], int, int]] = {
    "middle": (middle_model, 120, 60),
    "mezo": (mezo, 100, 60),
    "cross": (cross, 120, 60),
    "replay": (replay, 120, 60),
    "families": (families, 120, 40),
    "projections": (projections, 90, 30),
    "tests": (tests, 300, 120),
    "shardes": (shardes, 90, 40),
    "mnist": (rounds_of_mnist, 150, 60),
    "large": (large_model, 200, 120),
    "small": (small_model, 120, 40),
    "draws": (draws, 60, 15),
}


def run(words: list[str], log: Path, left: float) -> str:
    """Run one command and return how it ended."""
    settings = dict(word.split("=", 1) for word in words[:1] if word.startswith("JAX_PLATFORMS="))
    environment = {**os.environ, **settings}
    with log.open("a") as file:
        file.write(f"+ {' '.join(words)}\n")
        file.flush()
        process = subprocess.Popen(
            words[len(settings) :], stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            # The workers are killed, too; otherwise they would disturb the next measurement.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "out of time"
    return "done" if code == 0 else f"code {code}"


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__.split("\n")[0])
    if arguments.worker:
        worker(arguments)
        return
    names = [name for name in arguments.stages.split(",") if name] or [*STAGES]
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        sys.exit(f"--stages must be of {', '.join(STAGES)}; got {', '.join(unknown)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept, start = arguments.out / "stages.json", time.perf_counter()
    ended = json.loads(kept.read_text()) if kept.exists() else {}
    for name in names:
        make, limit, least = STAGES[name]
        if all(end == "done" for end in ended.get(name, {}).get("ends", ["not begun"])):
            print(name, "is done already", flush=True)
            continue
        begin, log = time.perf_counter(), arguments.out / f"{name}.log"
        budget = float("inf") if arguments.budget is None else arguments.budget - (begin - start)
        if budget < least:
            print(name, f"is left out: it needs {least} s, and {max(0, budget):.0f} s are left", flush=True)
            continue
        ends = []
        for words in make(arguments):
            left = min(limit, budget) - (time.perf_counter() - begin)
            ends.append(run(words, log, left) if left > 1 else "out of time")
        ended[name] = {"seconds": round(time.perf_counter() - begin, 1), "ends": ends}
        print(name, ended[name], flush=True)
        kept.write_text(json.dumps(ended, indent=2) + "\n")


if __name__ == "__main__":
    main()
