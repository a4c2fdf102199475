"""The time of replaying a run beside the time of running it, and the cost of appending to the ledger.

    python benchmarks/replay.py --data-dir FOLDER_WITH_IDX_FILES

The tasks are MNIST's CNN (64 clients, 8 a round, K = 1, P = 5) and the digits by default. Runs and replays are in one
process, compiled before they are timed. The language model is that of ``llm_reviews.py``, if ``--model`` names one. It
has a few rounds, since its replay makes the same directions as its rounds.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import tyro
from rich.console import Console
from rich.table import Table

import hiso_jax
from hiso_jax import fed, tasks
from hiso_jax.fed.ledger import FileLedger
from hiso_jax.fed.ledger.ledger import create
from hiso_jax.fed.ledger.reading import LEDGER, load


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      data_dir: folder with MNIST's IDX files; without it MNIST is left out.
      model: SmolLM2-135M as a GGUF file, with --reviews; without it the language model is left out.
      reviews: folder with train.jsonl and validation.jsonl.
      rounds: rounds of MNIST and of the digits.
      model_rounds: rounds of the language model.
      repeats: number of timed replays.
      out: JSON file to write.
    """

    data_dir: Path | None = None
    model: str | None = None
    reviews: Path | None = None
    rounds: int = 1000
    model_rounds: int = 4
    repeats: int = 3
    out: Path = Path("benchmarks/results/replay.json")


def language_model(arguments):
    from hiso_jax.models import lm
    from hiso_jax.models.lm import tune
    from hiso_jax.tasks.text import text_task

    pretrained = lm.load(arguments.model)
    model = tune(pretrained, "all")
    words: dict[str, Any] = {"template": "{text} It was", "verbalizer": (" bad", " good")}
    return text_task(
        "text-classification", model, pretrained, data_dir=arguments.reviews, train_rows=512, test_rows=16, **words
    )


def measure(name, task, tx, population, config, repeats):
    """Seconds of the rounds, of their replay, and whether it is exact."""
    print(name, flush=True)
    simulation = fed.Simulation(task, tx, population, config)
    seconds = [simulation.run().run_seconds for _ in range(repeats if config.rounds > 10 else 1)]
    result = simulation.run()
    seconds.append(result.run_seconds)
    replays = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        params, state = jax.block_until_ready(fed.replay(result.initial_params, tx, result.records))
        replays.append(time.perf_counter() - begin)
    return {
        "name": name,
        "rounds": config.rounds,
        "run_seconds": median(seconds),
        # The first replay compiles.
        "replay_seconds": median(replays[1:]),
        "ratio": median(replays[1:]) / median(seconds),
        "exact": fed.fingerprint((params, state)) == fed.fingerprint((result.params, result.state)),
    }


def appending(task, tx, population, config, rounds_per_dispatch):
    """Seconds a round of appending and syncing, with this number of rounds in a dispatch."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        storage = fed.Storage(Path(folder) / "run")
        records = fed.Simulation(task, tx, population, config, storage=storage).run().records
        header = load(storage.folder / LEDGER).header
        ledger = FileLedger(create(Path(folder) / LEDGER, header))
        begin = time.perf_counter()
        for place in range(0, len(records.round), rounds_per_dispatch):
            taken = slice(place, place + rounds_per_dispatch)
            ledger.append(jax.tree.map(lambda column, taken=taken: column[taken] if column.ndim else column, records))
        seconds = time.perf_counter() - begin
        ledger.close()
    return seconds / len(records.round)


def main(arguments: Arguments) -> None:
    rows = []
    digits = tasks.digits()
    population = fed.dirichlet(digits.train["label"], 100, alpha=0.5)
    config = fed.SimulationConfig(rounds=arguments.rounds, cohort=10, eval_every=arguments.rounds)
    tx = hiso_jax.hiso(0.01)
    rows.append(measure("digits", digits, tx, population, config, arguments.repeats))
    append = {each: appending(digits, tx, population, config, each) for each in (1, 50)}
    if arguments.data_dir is not None:
        mnist = tasks.mnist(arguments.data_dir)
        population = fed.dirichlet(mnist.train["label"], 64, alpha=1.0)
        config = fed.SimulationConfig(rounds=arguments.rounds, cohort=8, eval_every=arguments.rounds)
        rows.append(measure("MNIST", mnist, hiso_jax.hiso(1e-3), population, config, 1))
    if arguments.model is not None:
        task = language_model(arguments)
        population = fed.dirichlet_balanced(task.train["label"], 6, alpha=1.0)
        config = fed.SimulationConfig(
            rounds=arguments.model_rounds, cohort=2, batch_size=16, eval_every=arguments.model_rounds
        )
        rows.append(measure("SmolLM2-135M", task, hiso_jax.hiso(5e-5), population, config, 1))

    table = Table(title=f"Replay beside the run, {jax.devices()[0].device_kind}")
    for heading in ("task", "rounds", "run s", "replay s", "ratio", "exact"):
        table.add_column(heading, justify="right")
    for row in rows:
        figures = f"{row['run_seconds']:.2f}", f"{row['replay_seconds']:.3f}", f"{row['ratio']:.3f}"
        table.add_row(row["name"], str(row["rounds"]), *figures, str(row["exact"]))
    Console().print(table)
    for each, seconds in append.items():
        print(f"appending and syncing {each} rounds at a time: {1e6 * seconds:.0f} µs a round")
    report = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows, "append_seconds": append}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__.split("\n")[0]))
