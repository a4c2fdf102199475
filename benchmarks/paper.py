"""The papers' tables, and ours, as presets of `hiso-jax compare`: under its symmetric metric and under the paper's.

    python benchmarks/paper.py --list
    python benchmarks/paper.py --presets digits
    python benchmarks/paper.py --presets mnist-8-1,mnist-64-1 --mnist FOLDER_WITH_IDX_FILES
    python benchmarks/paper.py --presets mnist-all-methods --mnist FOLDER_WITH_IDX_FILES
    python benchmarks/paper.py --presets reviews --reviews FOLDER --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/paper.py --presets opt-125m-sst2,opt-1.3b-qqp   # needs a hub, and a GPU for the large ones

Each preset is one `tune.compare` in a folder of its own under `--out`. A preset that was interrupted continues, and one
that is done is only printed again. Several processes that are started on one preset share its methods. The paper's
convention (arXiv 2506.02370) is asymmetric: DeComFL's rounds are those to its own best value, and any other method's
those to its first evaluation at least as good.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hiso_jax import ParameterError, algorithms, tune
from hiso_jax.cli.progress import StudyProgress

SCALAR_ONLY = [name for name in algorithms.NAMES if algorithms.load(name).has_scalars]
ALL = ["decomfl", *(name for name in SCALAR_ONLY if name != "decomfl")]
CHIEF = ["decomfl", "hiso", "mosaic", "hiso_isotropic", "zo_adam", "fed_avg"]
# The papers' settings: 8 of 64 clients on OPT-125M, 2 of 6 on larger models, and their rates of DeComFL and HiSo.
OPT = {"125m": (64, 8, 1000, 5e-6, 5e-5), "350m": (6, 2, 2000, 5e-6, 1e-5)}
OPT |= {size: (6, 2, 3000, 5e-6, 1e-5) for size in ("1.3b", "2.7b")}


@dataclass(frozen=True)
class Preset:
    """A comparison.

    Attributes:
      algorithms: names of the methods.
      options: options of `tune.compare`.
      needs: the folder or file that must be given.
      says: its description.
    """

    algorithms: list[str]
    options: dict[str, Any]
    needs: str | None
    says: str


def _images(task: str, needs: str) -> dict[str, Preset]:
    """Three mixtures of labels and two cohorts, five paired seeds at cohort 8 and three at 64."""
    found = {}
    target = {"mnist": 0.7, "fashion-mnist": 0.6}[task]
    for cohort in (8, 64):
        for alpha in (0.1, 1.0, None):
            clients = 64 if cohort == 8 else 256
            mixture: dict[str, Any] = {"partition": "iid"} if alpha is None else {"alpha": alpha}
            options = dict(
                task=task, clients=clients, cohort=cohort, rounds=500, eval_every=20, tries=5, tuning_seeds=1,
                seeds=5 if cohort == 8 else 3, validation=2000, target=target, **mixture,
            )  # fmt: skip
            named = "iid" if alpha is None else f"{alpha:g}"
            says = f"{task}, {cohort} of {clients} clients, {'i.i.d.' if alpha is None else f'Dirichlet {named}'}"
            found[f"{task}-{cohort}-{named}"] = Preset(CHIEF, options, needs, says)
    return found


def _opt() -> dict[str, Preset]:
    """OPT on three tasks at the paper's rates."""
    found = {}
    for size, (clients, cohort, rounds, decomfl, hiso) in OPT.items():
        for task in ("sst2", "qqp", "squad"):
            generates = task == "squad"
            options: dict[str, Any] = dict(
                task=task, model=f"facebook/opt-{size}", revision="converted", trainable="all", clients=clients,
                cohort=cohort, rounds=rounds, eval_every=50, batch_size=8 if generates else 16, seeds=1,
                learning_rate=[f"decomfl={decomfl:g}", f"hiso={hiso:g}"],
            )  # fmt: skip
            if not generates:
                options["weight_decay"] = 5e-4
            says = f"OPT-{size.upper()} on {task} at the paper's rates"
            found[f"opt-{size}-{task}"] = Preset(["decomfl", "hiso"], options, None, says)
    return found


REVIEWS: dict[str, Any] = dict(
    task="text-classification", template="{text} It was", verbalizer=[" bad", " good"], trainable="lora"
)
PRESETS: dict[str, Preset] = {
    "digits": Preset(
        [*ALL, "fed_avg"],
        dict(rounds=1200, eval_every=10, seeds=5),
        None,
        "digits, 10 of 100 clients, all scalar-only methods",
    ),
    **_images("mnist", "mnist"),
    **_images("fashion-mnist", "fashion_mnist"),
    "mnist-all-methods": Preset(
        ALL,
        dict(
            task="mnist", clients=64, cohort=8, alpha=1.0, rounds=500, eval_every=20, tuning_seeds=1, seeds=3,
            target=0.7, validation=2000, batch_size=16, tries=4, schedules=["constant", "cosine"],
        ),
        "mnist",
        "MNIST, 8 of 64 clients, Dirichlet 1, all scalar-only methods",
    ),
    "reviews": Preset(
        ["decomfl", "hiso", "mosaic"],
        dict(
            **REVIEWS, rounds=36, eval_every=3, learning_rate=["decomfl=1e-2", "hiso=1e-2", "mosaic=3e-2"], seeds=1,
            target=0.72, test_rows=200,
        ),
        "reviews",
        "SmolLM2-135M with LoRA on movie reviews, 2 of 6 clients, rates of an earlier look, one seed",
    ),
    "reviews-tuned": Preset(
        ["decomfl", "hiso", "mosaic"],
        dict(
            **REVIEWS, rounds=240, eval_every=20, tries=4, schedules=["constant"], tuning_seeds=1, validation=512,
            seeds=3, target=0.75,
        ),
        "reviews",
        "SmolLM2-135M with LoRA on movie reviews, 2 of 6 clients, for a GPU",
    ),
    **_opt(),
}  # fmt: skip


@dataclass
class Arguments:
    """Run the papers' tables, and ours, as presets of `hiso-jax compare`.

    Attributes:
      presets: names of presets, comma-separated; see --list.
      list: only list the presets.
      mnist, fashion_mnist: folders with IDX files.
      reviews: folder with train and validation files of movie reviews.
      smollm2: the language model for the reviews.
      out: folder of the comparisons.
      seeds, tries, rounds: values in place of a preset's.
    """

    presets: str = "digits"
    list: bool = False
    mnist: Path | None = None
    fashion_mnist: Path | None = None
    reviews: Path | None = None
    smollm2: Path | None = None
    out: Path = Path("runs/paper")
    seeds: int | None = None
    tries: int | None = None
    rounds: int | None = None


def options_of(preset: Preset, arguments: Arguments) -> dict[str, Any]:
    """The options of `tune.compare`.

    Raises:
      ValueError: a folder that the preset needs is not given.
    """
    # The methods are those of their papers: the server clips a message only if the method does.
    options = {**preset.options, "guard": False}
    options |= {name: given for name in ("seeds", "tries", "rounds") if (given := getattr(arguments, name)) is not None}
    if preset.needs is not None:
        given = getattr(arguments, preset.needs)
        if given is None:
            raise ValueError(f"--{preset.needs.replace('_', '-')} must name the data of this preset")
        options["data_dir"] = given
    if preset.needs == "reviews":
        if arguments.smollm2 is None:
            raise ValueError("--smollm2 must name the language model of this preset")
        options["model"] = str(arguments.smollm2)
    return options


def _value(value: float | None, sign: int) -> float:
    """A value of the metric, larger is better; a value that is not finite, null in the file, is the worst."""
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
        folder, preset = arguments.out / name, PRESETS[name]
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            options = options_of(preset, arguments)
            found = tune.compare(preset.algorithms, out=folder, watcher=StudyProgress(console), **options)
        except (ParameterError, ValueError) as error:
            sys.exit(f"{name}: {error}")
        console.print(str(found), highlight=False)
        if "decomfl" in json.loads((folder / "comparison.json").read_text())["methods"]:
            console.print(papers_table(folder))


if __name__ == "__main__":
    main()
