"""The resistance of rules of combination to attacks, for HiSo, DeComFL and mosaic.

    python benchmarks/robustness.py --out results/robustness_digits.json
    python benchmarks/robustness.py --alpha 10 --methods hiso decomfl --attacks nobody "flip × 10" \
        --out results/robustness_digits.json
    python benchmarks/robustness.py --task mnist --data-dir FOLDER --rounds 120 --batch-size 16 --seeds 1 \
        --attacks nobody "flip × 10" --methods hiso decomfl --of population cohort --out mnist.json

Every setting is one program, its seeds side by side; each method takes a rate tuned with the mean where nobody is
hostile. An existing file of results is extended: a cell that it holds is not run again.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hiso_jax import algorithms, fed, tasks

# A method's name, its options, P, and its rates, which are tuned with the mean where nobody is hostile.
METHODS: dict[str, tuple[str, dict[str, Any], int, dict[str, float]]] = {
    "hiso": ("hiso", {}, 16, {"digits": 0.03, "mnist": 0.003}),
    "hiso, P 5": ("hiso", {}, 5, {"digits": 0.017, "mnist": 0.001}),
    "decomfl": ("decomfl", {}, 16, {"digits": 0.1, "mnist": 0.002}),
    "mosaic, shared": (
        "mosaic",
        {"direction_groups": "shared", "scalar_bits": 4, "clipping": False},
        32,
        {"digits": 0.3, "mnist": 0.0025},
    ),
    "mosaic": ("mosaic", {"scalar_bits": 4, "clipping": False}, 32, {"digits": 0.3, "mnist": 0.005}),
}
# A combiner, with the clipping before it; and whether the guard stands before both.
RULES: dict[str, tuple[str, bool]] = {
    "mean, no guard": ("", False),
    "mean": ("", True),
    "clip to median": ("clip_to_median", True),
    "median, no guard": ("median", False),
    "median": ("median", True),
    "trimmed mean": ("trimmed_mean", True),
    "Krum": ("krum", True),
    "multi-Krum": ("multi_krum", True),
    "geometric median": ("geometric_median", True),
    "clip, median": ("clip_to_median+median", True),
}
ATTACKS: dict[str, tuple[str, dict[str, float]]] = {
    "nobody": ("", {}),
    "flip × 1": ("sign_flip", {"attack_scale": 1.0}),
    "flip × 10": ("sign_flip", {"attack_scale": 10.0}),
    "flip × 100": ("sign_flip", {"attack_scale": 100.0}),
    "scaled × 10": ("scaled", {"attack_scale": 10.0}),
    "scaled × 1e6": ("scaled", {"attack_scale": 1e6}),
    "gaussian × 10": ("gaussian_attack", {}),
    "inner product × 1": ("inner_product", {"attack_scale": 1.0}),
    "colluding": ("colluding", {}),
}


@dataclass(frozen=True)
class Settings:
    """Options of the script.

    Attributes:
      task: digits or mnist.
      data_dir: folder of MNIST's four IDX files.
      rounds: rounds of a run.
      batch_size: examples of a client's batch.
      alpha: concentration of the Dirichlet mixtures of labels; the larger, the more clients are alike.
      seeds: number of seeds.
      methods, rules, attacks: some of them; all by default.
      shares: shares of hostile clients.
      of: whether a share is of the population or of every cohort.
      out: JSON file of the results.
    """

    task: Literal["digits", "mnist"] = "digits"
    data_dir: Path | None = None
    rounds: int = 600
    batch_size: int = 32
    alpha: float = 0.5
    seeds: int = 5
    methods: tuple[str, ...] = tuple(METHODS)
    rules: tuple[str, ...] = tuple(RULES)
    attacks: tuple[str, ...] = tuple(ATTACKS)
    shares: tuple[float, ...] = (0.2,)
    of: tuple[Literal["population", "cohort"], ...] = ("population",)
    out: Path = Path("robustness.json")


def run(
    settings: Settings, task: Any, populations: list[Any], method: str, rule: str, attack: str, share: float, of: Any
):
    """The final value of every seed, or the reason for a refusal."""
    name, options, perturbations, rates = METHODS[method]
    (through, guard), (hostile, scale) = RULES[rule], ATTACKS[attack]
    whole = algorithms.load("+".join(filter(None, (name, through, hostile))))
    config = fed.SimulationConfig(
        rounds=settings.rounds,
        cohort=10,
        batch_size=settings.batch_size,
        eval_every=max(1, settings.rounds // 12),
        perturbations=perturbations,
        attackers=share if hostile else 0.0,
        attackers_of=of,
    )
    grid = fed.Grid([rates[settings.task]], range(settings.seeds), local_learning_rate=lambda r: r)
    given = {**options, **scale, "guard": guard}
    try:
        found = fed.sweep(task, lambda r: whole.build(r, given), populations, config, grid)
    except ValueError as error:
        return {"refused": str(error)}
    return {
        "final": found.metrics["accuracy"][:, 0, 0, -3:].mean(-1).round(4).tolist(),
        "diverged_at": found.diverged_at[:, 0, 0].tolist(),
        "seconds": round(found.run_seconds, 2),
    }


def key_of(settings: Settings, method: str, rule: str, attack: str, share: float, of: str) -> str:
    """The key of a cell's results in the file."""
    who = [share, of] if attack != "nobody" else []
    batch = [f"batch {settings.batch_size}"] if settings.batch_size != 32 else []
    mixture = [f"alpha {settings.alpha:g}"] if settings.alpha != 0.5 else []
    return " | ".join(map(str, [settings.task, method, rule, attack, *who, settings.rounds, *batch, *mixture]))


def main(settings: Settings) -> None:
    """Run what is missing, and print a table for every method, share and kind of share."""
    console = Console(width=200)
    task = tasks.digits() if settings.task == "digits" else tasks.mnist(settings.data_dir)
    # A fifth of MNIST's test split: an evaluation of all of it takes as long as ten rounds.
    task = replace(task, test={name: part[:2000] for name, part in task.test.items()})
    deal = [fed.dirichlet(task.train["label"], 100, alpha=settings.alpha, seed=seed) for seed in range(settings.seeds)]
    known = json.loads(settings.out.read_text()) if settings.out.exists() else {}
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    for place in product(settings.methods, settings.shares, settings.of, settings.attacks, settings.rules):
        method, share, of, attack, rule = place
        key = key_of(settings, method, rule, attack, share, of)
        if key not in known:
            begin = time.perf_counter()
            known[key] = run(settings, task, deal, method, rule, attack, share, of)
            settings.out.write_text(json.dumps(known, indent=1))
            print(
                f"{time.perf_counter() - begin:6.1f} s  {key}: {known[key].get('final')}", file=sys.stderr, flush=True
            )
    for method, share, of in product(settings.methods, settings.shares, settings.of):
        whole = "the population" if of == "population" else "every cohort"
        title = f"{settings.task}, {method}: {100 * share:g} % of {whole}"
        table = Table(title=title, box=SIMPLE_HEAD)
        for heading in ("", *settings.attacks):
            table.add_column(heading)
        for rule in settings.rules:
            found = [known[key_of(settings, method, rule, attack, share, of)] for attack in settings.attacks]
            table.add_row(rule, *map(cell, found))
        console.print(table)


def cell(found: dict[str, Any]) -> str:
    """The mean over the seeds, and how many diverged."""
    if "refused" in found:
        return "—"
    diverged = sum(at >= 0 for at in found["diverged_at"])
    return f"{np.mean(found['final']):.3f}" + (f" ({diverged} div.)" if diverged else "")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
