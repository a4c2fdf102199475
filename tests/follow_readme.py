"""Follow the README to the letter in a fresh clone, every command and code block in order, as a new user would.

    python -m tests.follow_readme CLONE --reviews FOLDER --mnist FOLDER

Placeholders in capitals are replaced by real names, and runs that would take an hour by runs of few rounds. Commands
that need a hub of models are left out. Every command is printed. The clone must have no environment yet.
"""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

MINE = """import numpy as np
import optax
from hiso_jax import fed, zo


@fed.algorithm.default_rates(digits=0.003)
def mine(learning_rate, *, beta: float = 0.9):
    \"\"\"Momentum over the rebuilt direction.

    Args:
      learning_rate: the rate.
      beta: what the momentum keeps.
    \"\"\"
    return fed.Algorithm(optax.chain(zo.scale_by_zo(), optax.sgd(learning_rate, momentum=beta)))


def by_region(train, clients, seed, *, regions: int = 5):
    \"\"\"Clients of one region hold neighbouring examples.

    Args:
      regions: number of regions.
    \"\"\"
    example = np.arange(len(train["label"]))
    return fed.by_column(example % regions + regions * (example % (clients // regions)))[0]
"""
HUB = ("facebook/opt-125m",)
# A part of a command → its replacement.
INSTEAD = {
    "--resume runs/RUN --rounds 2000": "--resume runs/RUN --rounds 32",
    "FOLDER_WITH_IDX_FILES": "mnist --rounds 20",
    "--base MODEL --out FOLDER": "--base SmolLM2-135M-Instruct.Q4_1.gguf --out applied",
}


def blocks(readme: str) -> list[tuple[str, str]]:
    """(language, code) of every block, and of the commands on MNIST in the text."""
    found = [(match.start(), match[1], match[2]) for match in re.finditer(r"```(sh|python)\n(.*?)```", readme, re.S)]
    inline = [(match.start(), "sh", match[1]) for match in re.finditer(r"`(hiso-jax run --task mnist[^`]*)`", readme)]
    return [(language, code) for _, language, code in sorted(found + inline)]


def commands(code: str) -> list[str]:
    """The commands of a block, each on one line, without comments."""
    joined = code.replace("\\\n", " ")
    lines = [re.sub(r"\s+#.*$", "", line).strip() for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def run(command: str, folder: Path, activated: bool) -> None:
    """Run a command, and fail if the command fails."""
    begin = time.perf_counter()
    prefix = ". .venv/bin/activate && " if activated else ""
    # Variables of this program's own environment must not influence the command.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HISO", "JAX"))}
    words = ["bash", "-euo", "pipefail", "-c", prefix + command]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    print(f"{time.perf_counter() - begin:7.1f} s  exit {done.returncode}  {command[:150]}", flush=True)
    # Warnings of the installer are left out.
    reported = [line for line in done.stderr.splitlines() if line.strip() and "pip" not in command]
    if reported:
        print(f"           stderr: {' / '.join(reported)[:300]}", flush=True)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])


def main(clone: Path, /, *, reviews: Path, mnist: Path, tests: bool = False) -> None:
    """Follow the README of ``clone``; with ``tests``, also run its command for the tests."""
    clone = clone.resolve()
    shutil.copytree(reviews, clone / "reviews")
    shutil.copytree(mnist, clone / "mnist")
    (clone / "mine.py").write_text(MINE)
    activated, begin = False, time.perf_counter()
    program: list[str] = []
    for language, code in blocks((clone / "README.md").read_text()):
        if language == "python":
            program.append(code)
            # A block may continue the block before it.
            whole = "\n".join(program) if "import" not in code else code
            program = [code] if "import" in code else program
            path = clone / "block.py"
            path.write_text(whole)
            run(f"python {path.name}", clone, activated)
            continue
        for command in commands(code):
            if command == ". .venv/bin/activate":
                activated = True
                continue
            if any(name in command for name in HUB) or ("pytest" in command and not tests):
                print(f"   left out: {command[:120]}", flush=True)
                continue
            for old, new in INSTEAD.items():
                command = command.replace(old, new)
            if "runs/RUN" in command and not (clone / "runs" / "RUN").exists():
                newest = max((clone / "runs").glob("text-classification-*"), key=lambda path: path.stat().st_mtime)
                shutil.copytree(newest, clone / "runs" / "RUN")
            run(command, clone, activated)
    print(f"all of it in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
