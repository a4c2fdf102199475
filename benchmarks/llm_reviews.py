"""Accuracy against rounds of fine-tuning SmolLM2-135M on movie reviews: HiSo and DeComFL, all parameters and LoRA.

    python benchmarks/llm_reviews.py --model SmolLM2-135M-Instruct.Q4_1.gguf --data-dir FOLDER --rounds 1000

FOLDER holds train.jsonl and validation.jsonl with the columns text and label. Every method is tuned on the same grid
of rates: ``--tune-rounds`` rounds each, scored by the loss on training examples held out from the clients. At its
best rate it then runs ``--rounds`` rounds, evaluated on the validation split. Results are written after every
evaluation, and a run that is in the file already is not made again, so the script can be stopped and called again.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro

import hiso_jax
from hiso_jax import fed
from hiso_jax.models import lm
from hiso_jax.models.lm import tune
from hiso_jax.tasks.text import text_task

METHODS = {"hiso": hiso_jax.hiso, "decomfl": hiso_jax.decomfl}
GRIDS = {"all": (1e-5, 5e-5, 2e-4), "lora": (1e-3, 3e-3, 1e-2)}


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      model: SmolLM2-135M as a GGUF file, or any other language model.
      data_dir: folder with train.jsonl and validation.jsonl.
      rounds: rounds of the final runs.
      eval_every: rounds between evaluations on the validation split.
      tune_rounds: rounds of each run of the grid; 0 skips tuning and takes --rates as they are.
      held_out: training examples on which the grid is scored.
      rates: with --tune-rounds 0, method:trainable=rate, comma-separated.
      methods: hiso, decomfl, comma-separated.
      trainable: all, lora, comma-separated.
      dtype: dtype in which the model computes.
      seed: seed of everything random.
      out: JSON file to write, and to continue.
    """

    model: str
    data_dir: Path
    rounds: int = 1000
    eval_every: int = 100
    tune_rounds: int = 100
    held_out: int = 256
    rates: str = ""
    methods: str = "hiso,decomfl"
    trainable: str = "all,lora"
    dtype: str = "float32"
    seed: int = 0
    out: Path = Path("benchmarks/results/llm_reviews.json")


def simulate(task, method, rate, rounds, eval_every, seed, record, save):
    """One run of 6 clients, 2 a round, P = 5, batch 16; its evaluations go into ``record`` as they come."""
    population = fed.dirichlet_balanced(task.train["label"], 6, alpha=1.0, seed=seed)
    config = fed.SimulationConfig(
        rounds=rounds, cohort=2, perturbations=5, batch_size=16, seed=seed, eval_every=eval_every
    )
    begin = time.perf_counter()

    def keep(session, row):
        if row is not None:
            record["rounds"].append(row.round)
            for name in ("accuracy", "loss"):
                record[name].append(row.metrics[name])
            record["seconds"] = row.seconds
            save()
            print(
                f"  round {row.round}: loss {row.metrics['loss']:.4f} accuracy {row.metrics['accuracy']:.4f}",
                flush=True,
            )

    record.update(rounds=[], accuracy=[], loss=[])
    result = fed.Simulation(task, METHODS[method](rate), population, config, callbacks=[fed.Callback(keep)]).run()
    record.update(
        diverged_at=result.diverged_at,
        wall_seconds=time.perf_counter() - begin,
        compile_seconds=result.compile_seconds,
        bytes_up_per_client=result.traffic["bytes_up_per_client"],
        complete=True,
    )
    save()


def main(arguments: Arguments) -> None:
    report = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"grid": {}, "runs": {}}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)

    def save():
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")

    pretrained = lm.load(arguments.model, dtype=arguments.dtype)
    given = dict(item.split("=") for item in arguments.rates.split(",") if item)
    report["device"] = jax.devices()[0].device_kind
    report["settings"] = {
        name: str(value) for name, value in vars(arguments).items() if name not in ("model", "data_dir", "out")
    }
    for trainable in arguments.trainable.split(","):
        task = text_task(
            "text-classification",
            tune(pretrained, trainable),
            pretrained,
            data_dir=arguments.data_dir,
            template="{text} It was",
            verbalizer=(" bad", " good"),
        )
        for method in arguments.methods.split(","):
            name = f"{method}:{trainable}"
            if arguments.tune_rounds:
                tuning = task.hold_out(arguments.held_out, seed=arguments.seed)
                for rate in GRIDS[trainable]:
                    record = report["grid"].setdefault(f"{name}={rate:g}", {})
                    if not record.get("complete"):
                        print(f"{name} rate {rate:g}: {arguments.tune_rounds} rounds", flush=True)
                        rounds = arguments.tune_rounds
                        simulate(tuning, method, rate, rounds, rounds, arguments.seed, record, save)

                def score(rate, name=name):
                    record = report["grid"][f"{name}={rate:g}"]
                    return math.inf if record["diverged_at"] is not None else record["loss"][-1]

                rate = min(GRIDS[trainable], key=score)
            else:
                rate = float(given[name])
            record = report["runs"].setdefault(f"{name}={rate:g}", {})
            ended = record.get("complete") and record["diverged_at"] is not None
            if not ended and (not record.get("complete") or record["rounds"][-1] < arguments.rounds):
                print(f"{name} at its best rate {rate:g}: {arguments.rounds} rounds", flush=True)
                simulate(task, method, rate, arguments.rounds, arguments.eval_every, arguments.seed, record, save)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__.split("\n")[0]))
