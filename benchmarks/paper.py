"""The papers' tables, and ours, as presets of `hiso-jax compare`: under its symmetric metric and under the paper's.

    python benchmarks/paper.py --list
    python benchmarks/paper.py --presets digits
    python benchmarks/paper.py --presets mnist-8-1,mnist-64-1 --mnist FOLDER_WITH_IDX_FILES
    python benchmarks/paper.py --presets mnist-all-methods --mnist FOLDER_WITH_IDX_FILES
    python benchmarks/paper.py --presets mnist-all-methods --mnist FOLDER_WITH_IDX_FILES --jobs 12   # of one GPU
    python benchmarks/paper.py --presets reviews --reviews FOLDER --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/paper.py --presets opt-125m-sst2,opt-1.3b-qqp   # needs a hub, and a GPU for the large ones

Each preset is one `hiso-jax compare` in a folder of its own under `--out`; a preset that was ended goes on, and one
that is done is only told again. The paper's convention (arXiv 2506.02370) is asymmetric: DeComFL's rounds are those to
its own best value, any other method's those to its first evaluation at least as good.
"""

import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hiso_jax import algorithms

SCALAR_ONLY = [name for name in algorithms.NAMES if algorithms.load(name).has_scalars]
CHIEF = "decomfl,hiso,mosaic,hiso_isotropic,zo_adam,fed_avg"
# The papers': 8 of 64 clients on OPT-125M, 2 of 6 on larger ones; rates of DeComFL and HiSo as they are there.
OPT = {"125m": (64, 8, 1000, "5e-6", "5e-5"), "350m": (6, 2, 2000, "5e-6", "1e-5")}
OPT |= {size: (6, 2, 3000, "5e-6", "1e-5") for size in ("1.3b", "2.7b")}


@dataclass(frozen=True)
class Preset:
    """A comparison.

    Attributes:
      words: options of `hiso-jax compare`.
      needs: which folder or file must be given.
      says: what it is.
    """

    words: tuple[str, ...]
    needs: str | None
    says: str


def _images(task: str, needs: str) -> dict[str, Preset]:
    """Three mixtures of labels and two cohorts, five paired seeds at cohort 8 and three at 64."""
    found = {}
    target = {"mnist": "0.7", "fashion-mnist": "0.6"}[task]
    for cohort in (8, 64):
        for alpha in ("0.1", "1", "iid"):
            deal = ("--partition", "iid") if alpha == "iid" else ("--alpha", alpha)
            seeds = "5" if cohort == 8 else "3"
            sizes = (
                "--clients",
                "64" if cohort == 8 else "256",
                "--cohort",
                str(cohort),
                "--rounds",
                "500",
                "--eval-every",
                "20",
            )
            tuned = ("--tries", "5", "--tuning-seeds", "1", "--seeds", seeds, "--validation", "2000")
            words = ("--task", task, "--algorithms", CHIEF, *sizes, *tuned, *deal, "--target", target)
            says = f"{task}, {cohort} of {sizes[1]} clients, {'i.i.d.' if alpha == 'iid' else f'Dirichlet {alpha}'}"
            found[f"{task}-{cohort}-{alpha}"] = Preset(words, needs, says)
    return found


def _opt() -> dict[str, Preset]:
    found = {}
    for size, (clients, cohort, rounds, decomfl, hiso) in OPT.items():
        for task in ("sst2", "qqp", "squad"):
            generates = task == "squad"
            sizes = ("--clients", str(clients), "--cohort", str(cohort), "--rounds", str(rounds), "--eval-every", "50")
            model = ("--model", f"facebook/opt-{size}", "--revision", "converted", "--trainable", "all")
            rates = ("--learning-rate", f"decomfl={decomfl},hiso={hiso}", "--batch-size", "8" if generates else "16")
            decay = () if generates else ("--weight-decay", "5e-4")
            words = ("--task", task, "--algorithms", "decomfl,hiso", *model, *sizes, *rates, *decay, "--seeds", "1")
            found[f"opt-{size}-{task}"] = Preset(words, None, f"OPT-{size.upper()} on {task} at the paper's rates")
    return found


ALL = ",".join(name for name in SCALAR_ONLY if name not in ("decomfl",))
PRESETS: dict[str, Preset] = {
    "digits": Preset(
        ("--algorithms", f"decomfl,{ALL},fed_avg", "--rounds", "1200", "--eval-every", "10", "--seeds", "5"),
        None,
        "digits, 10 of 100 clients, all scalar-only methods",
    ),
    **_images("mnist", "mnist"),
    **_images("fashion-mnist", "fashion_mnist"),
    "mnist-all-methods": Preset(
        (
            *("--task", "mnist", "--algorithms", f"decomfl,{ALL}", "--clients", "64", "--cohort", "8", "--alpha", "1"),
            *("--rounds", "500", "--eval-every", "20", "--tuning-seeds", "1", "--seeds", "3", "--target", "0.7"),
            *("--validation", "2000", "--batch-size", "16", "--tries", "4", "--schedules", "constant,cosine"),
        ),
        "mnist",
        "MNIST, 8 of 64 clients, Dirichlet 1, all scalar-only methods",
    ),
    "reviews": Preset(
        (
            *("--task", "text-classification", "--template", "{text} It was", "--verbalizer", " bad, good"),
            *("--algorithms", "decomfl,hiso,mosaic", "--trainable", "lora", "--rounds", "36", "--eval-every", "3"),
            *("--learning-rate", "decomfl=1e-2,hiso=1e-2,mosaic=3e-2", "--seeds", "1", "--target", "0.72"),
            *("--test-rows", "200"),
        ),
        "reviews",
        "SmolLM2-135M with LoRA on movie reviews, 2 of 6 clients, rates of an earlier look, one seed",
    ),
    "reviews-tuned": Preset(
        (
            *("--task", "text-classification", "--template", "{text} It was", "--verbalizer", " bad, good"),
            *("--algorithms", "decomfl,hiso,mosaic", "--trainable", "lora", "--rounds", "240", "--eval-every", "20"),
            *("--tries", "4", "--schedules", "constant", "--tuning-seeds", "1", "--validation", "512"),
            *("--seeds", "3", "--target", "0.75"),
        ),
        "reviews",
        "SmolLM2-135M with LoRA on movie reviews, 2 of 6 clients, for a GPU",
    ),
    **_opt(),
}


@dataclass
class Arguments:
    """What to run.

    Attributes:
      presets: comma-separated; see --list.
      list: only list them.
      mnist, fashion_mnist: folders with IDX files.
      reviews: folder with train and validation files of movie reviews.
      smollm2: the language model for them.
      out: folder of the comparisons.
      jobs: processes that share a preset's methods; what all but the first say is in OUT/PRESET-N.log.
      more: options of `hiso-jax compare` in place of a preset's, in one word, typed with an equals sign:
        --more="--seeds 10 --tries 7".
    """

    presets: str = "digits"
    list: bool = False
    mnist: Path | None = None
    fashion_mnist: Path | None = None
    reviews: Path | None = None
    smollm2: Path | None = None
    out: Path = Path("runs/paper")
    jobs: int = 1
    more: str = ""


def command(preset: Preset, arguments: Arguments, folder: Path) -> list[str]:
    """The words of `hiso-jax compare`.

    Raises:
      ValueError: a folder that the preset needs is not given.
    """
    if (folder / "config.json").exists():
        return ["--resume", str(folder)]
    words = list(preset.words)
    if preset.needs is not None:
        given = getattr(arguments, preset.needs)
        if given is None:
            raise ValueError(f"--{preset.needs.replace('_', '-')} must name the data of this preset")
        words += ["--data-dir", str(given)]
    if preset.needs == "reviews":
        if arguments.smollm2 is None:
            raise ValueError("--smollm2 must name the language model of this preset")
        words += ["--model", str(arguments.smollm2)]
    # The methods are those of their papers: no message is shortened that they do not shorten.
    return [*words, "--no-guard", *arguments.more.split(), "--out", str(folder)]


def compare(words: list[str], folder: Path, jobs: int) -> int:
    """Run `hiso-jax compare`, by several processes that share its methods if asked for; its exit code."""
    start = [sys.executable, "-m", "hiso_jax.cli.main", "compare"]
    first = subprocess.Popen([*start, *words])
    # The others find what is asked for where the first has written it.
    while jobs > 1 and not (folder / "config.json").exists() and first.poll() is None:
        time.sleep(0.2)
    others = []
    for number in range(1, jobs):
        with (folder.parent / f"{folder.name}-{number}.log").open("w") as log:
            others.append(subprocess.Popen([*start, "--resume", str(folder)], stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait() for process in (first, *others)]
    if jobs > 1 and not any(codes):
        return subprocess.run([*start, "--resume", str(folder)], check=False).returncode
    # The code of a process that was ended by a signal is negative.
    return next((code for code in codes if code), 0)


def _value(value: float | None, sign: int) -> float:
    """A value of the metric, larger is better; what is not finite, null in the file, is the worst."""
    return -math.inf if value is None else sign * value


def papers_table(folder: Path) -> Table:
    """Rounds under the paper's convention, means over the seeds."""
    content: dict[str, Any] = json.loads((folder / "comparison.json").read_text())
    methods = content["methods"]
    metric = next(iter(methods.values()))["runs"][0]["metric"]
    sign = -1 if metric == "loss" else 1
    curves: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        curves.setdefault((row["algorithm"], row["seed"]), []).append((row["round"], _value(row[metric], sign)))
    seeds = sorted({seed for _, seed in curves})
    best = {seed: max(curves["decomfl", seed], key=lambda at: at[1]) for seed in seeds}
    title = f"the paper's convention: rounds to DeComFL's own best {metric}, and to match it"
    view = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("method", "rounds", "of decomfl's", "matched"):
        view.add_column(column, justify="left" if column == "method" else "right")
    for name in methods:
        ratios, rounds = [], []
        for seed in seeds:
            first = next((at for at, value in curves.get((name, seed), []) if value >= best[seed][1]), None)
            first = best[seed][0] if name == "decomfl" else first
            if first is not None:
                rounds.append(first)
                ratios.append(first / best[seed][0])
        matched = f"{len(rounds)} of {len(seeds)}"
        view.add_row(name, *([f"{np.mean(rounds):.0f}", f"{np.mean(ratios):.3g}"] if rounds else ["—", "—"]), matched)
    return view


def main() -> None:
    arguments, console = tyro.cli(Arguments), Console()
    if arguments.list:
        for name, preset in PRESETS.items():
            console.print(f"{name:26} {preset.says}", highlight=False, soft_wrap=True)
        return
    names = arguments.presets.split(",")
    for name in names:
        if name not in PRESETS:
            sys.exit(f"--presets must be of {', '.join(PRESETS)}; got {name}")
    for name in names:
        folder = arguments.out / name
        try:
            words = command(PRESETS[name], arguments, folder)
        except ValueError as error:
            sys.exit(f"{name}: {error}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        code = compare(words, folder, arguments.jobs)
        if code:
            sys.exit(code)
        if "decomfl" in json.loads((folder / "comparison.json").read_text())["methods"]:
            console.print(papers_table(folder))


if __name__ == "__main__":
    main()
