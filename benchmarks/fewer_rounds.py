"""Rounds, bytes and loss evaluations that methods need, each at its own best rate and schedule.

    python benchmarks/fewer_rounds.py --task digits
    python benchmarks/fewer_rounds.py --task mnist --data-dir FOLDER_WITH_IDX_FILES --cohort 8
    python benchmarks/fewer_rounds.py --task perceptron --data-dir FOLDER_WITH_IDX_FILES
    python benchmarks/fewer_rounds.py --task reviews --model SmolLM2-135M-Instruct.Q4_1.gguf --data-dir FOLDER

Every method and schedule is tuned on a validation split with seeds of its own, on a grid of rates that grows until its
best is inside; then each method runs at its best with other seeds on the whole training set, and is measured on the
test split. Methods of one seed share initial parameters, partition, cohorts and batches. A task has one JSON file,
written after every method, so that an interrupted comparison can continue. ``--report`` makes the tables and the
picture from the file.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from fewer_rounds_report import report
from rich.console import Console

from hiso_jax import algorithms, channels, fed, models, tasks
from hiso_jax.fed.keys import traits_key
from hiso_jax.fed.population import Work
from hiso_jax.fed.run.traffic import NEVER_CAME, directions_made, download_bytes, last_synced_rounds, upload_bytes
from hiso_jax.schedules import inverse_sqrt

SCHEDULES: dict[str, Callable[[Any, int], Any]] = {
    "constant": lambda rate, rounds: rate,
    "cosine": optax.cosine_decay_schedule,
    "inverse-sqrt": lambda rate, rounds: inverse_sqrt(rate),
}
FLEETS = {
    # A phone on a mobile network, and a machine in a data centre: seconds, and bytes a second.
    "phones": fed.Fleet(fed.LogNormal(0.1, 0.5), fed.LogNormal(2.5e6, 0.5), fed.LogNormal(6e5, 0.5), 0.01),
    "data centre": fed.Fleet(fed.LogNormal(0.01, 0.1), fed.LogNormal(1e9, 0.1), fed.LogNormal(1e9, 0.1), 0.001),
}
# Seconds of a round whatever is sent: a phone is woken and answers.
LATENCY = {"phones": 2.0, "data centre": 0.001}


@dataclass(frozen=True)
class Entry:
    """A method of the comparison.

    Attributes:
      make: learning rate or schedule → the algorithm.
      perturbations: P.
      rate: a guess at its best rate, as a multiple of DeComFL's.
      length: rounds of its runs, as a share of DeComFL's.
      local_steps: K.
      batches: its batch size, as a multiple of the others'.
    """

    make: Callable[[Any], fed.Algorithm]
    perturbations: int
    rate: float
    length: float
    local_steps: int = 1
    batches: int = 1


def _decomfl(*, rescale: tuple[fed.Clip, ...] = (), **options: Any) -> Callable[[Any], fed.Algorithm]:
    wire = {name: options.pop(name) for name in ("scalar_bits", "aggregate_bits") if name in options}

    def make(rate: Any) -> fed.Algorithm:
        method = algorithms.load("decomfl")
        built = method.build(rate, options | wire)
        return fed.Algorithm(built.tx, rescale=rescale, wire=built.wire)

    return make


def _mosaic(**options: Any) -> Callable[[Any], fed.Algorithm]:
    return lambda rate: algorithms.mosaic(rate, **options)


CLIPPED = channels.clip_to_median()
ENTRIES: dict[str, Entry] = {
    "decomfl": Entry(_decomfl(), 5, 1, 1),
    "decomfl, 8 bits both ways": Entry(_decomfl(scalar_bits=8, aggregate_bits=8), 5, 1, 1),
    "decomfl, 4 bits both ways": Entry(_decomfl(scalar_bits=4, aggregate_bits=4), 5, 1, 1),
    "decomfl, batch × 11": Entry(_decomfl(), 5, 1, 1, batches=11),
    "hiso": Entry(algorithms.hiso, 5, 0.5, 1),
    "own directions alone": Entry(_decomfl(direction_groups="own"), 5, 1.3, 1),
    "shared 32 × float32": Entry(_decomfl(), 32, 6.4, 0.4),
    "shared 32 × 4 bits": Entry(_decomfl(rescale=(CLIPPED,), scalar_bits=4), 32, 6.4, 0.4),
    "shared 32 × 4 bits, told in 4": Entry(_decomfl(rescale=(CLIPPED,), scalar_bits=4, aggregate_bits=4), 32, 6.4, 0.4),
    "own 64 × 2 bits, unclipped": Entry(_mosaic(clipping=False), 64, 16, 0.25),
    "mosaic 16 × 8": Entry(_mosaic(), 16, 4, 0.5),
    "mosaic 32 × 4": Entry(_mosaic(), 32, 8, 0.33),
    "mosaic 64 × 2": Entry(_mosaic(), 64, 18, 0.25),
    "mosaic 128 × 1": Entry(_mosaic(), 128, 40, 0.2),
    "mosaic K = 4, 16 × 2": Entry(_mosaic(), 16, 3, 0.25, local_steps=4),
    "fed_sgd": Entry(algorithms.fed_avg, 5, 20, 0.25),
}


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      task: digits; mnist, a CNN of 28,938 parameters; perceptron, one of 200,350 on MNIST; or reviews, a language
        model on movie reviews.
      data_dir: folder with MNIST's IDX files (or Fashion-MNIST's of the same names).
      name: name of the results; by default made of the task and the cohort.
      methods: some of them, semicolon-separated; by default all.
      schedules: schedules to try, comma-separated.
      clients, cohort, alpha, batch_size: the number of clients, the cohort size, the Dirichlet concentration, and the
        batch size of a client.
      width: hidden units of the perceptron.
      model: the language model for the reviews, a GGUF file or a folder.
      trainable: the trained part for the reviews, lora or all.
      rates: rates in place of tuning, method=rate, semicolon-separated, with the first of the schedules.
      rounds: rounds of DeComFL; others run a share of them.
      longest: most rounds of a method with more than 5 directions or a shorter run; 0 is any number.
      rate: a guess at DeComFL's best rate.
      step: ratio of neighbours in the grid of rates.
      targets: metric values, comma-separated; rates are tuned for the first.
      tuning_seeds, seeds: numbers of seeds.
      every: rounds between evaluations.
      test_rows: rows of the test split that are read; 0 is all.
      out: folder of the JSON file.
      report: only make the tables and the picture.
    """

    task: Literal["digits", "mnist", "perceptron", "reviews"] = "digits"
    data_dir: Path | None = None
    name: str = ""
    methods: str = ""
    schedules: str = "constant,cosine,inverse-sqrt"
    clients: int = 100
    cohort: int = 10
    alpha: float = 0.5
    batch_size: int = 32
    width: int = 252
    model: str = ""
    trainable: str = "lora"
    rates: str = ""
    rounds: int = 1200
    longest: int = 0
    rate: float = 0.04
    step: float = 1.5
    targets: str = "0.90,0.93"
    tuning_seeds: int = 3
    seeds: int = 10
    every: int = 2
    test_rows: int = 0
    out: Path = Path("benchmarks/results/fewer_rounds")
    report: bool = False


FIRST_TUNING_SEED = 100


def load_task(arguments: Arguments) -> Any:
    if arguments.task == "digits":
        return tasks.digits()
    if arguments.task == "reviews":
        return load_reviews(arguments)
    task = tasks.mnist(arguments.data_dir)
    if arguments.task == "perceptron":
        network = models.mlp(side=28, hidden=arguments.width)
        task = tasks.Classification(
            network.init,
            lambda params, x: network.apply(params, x.astype(jnp.float32) / 255),
            task.train,
            task.test,
        )
    return task


def load_reviews(arguments: Arguments) -> Any:
    from hiso_jax.models import lm
    from hiso_jax.models.lm import tune
    from hiso_jax.tasks.text import text_task

    pretrained = lm.load(arguments.model)
    return text_task(
        "text-classification",
        tune(pretrained, arguments.trainable),
        pretrained,
        data_dir=arguments.data_dir,
        template="{text} It was",
        verbalizer=(" bad", " good"),
        test_rows=arguments.test_rows or None,
    )


@dataclass
class Bench:
    """A task with the options of its comparison.

    Attributes:
      arguments: the options.
      task: the task with the splits on which methods are measured.
      tuning: the task with the splits on which methods are tuned.
    """

    arguments: Arguments
    task: Any
    tuning: Any = field(init=False)

    def __post_init__(self) -> None:
        total = len(self.task.train["label"])
        self.tuning = fed.hold_out(self.task, total // 5 if total < 10_000 else 2000, seed=FIRST_TUNING_SEED)
        rows = self.arguments.test_rows
        if rows and rows < len(self.task.test["label"]):
            test = jax.tree.map(lambda a: a[:rows], self.task.test)
            self.task = fed.task.HeldOut(self.task, self.task.train, test)

    def config(self, entry: Entry, seed: int, **more: Any) -> fed.SimulationConfig:
        a = self.arguments
        return fed.SimulationConfig(
            rounds=self.rounds(entry),
            cohort=a.cohort,
            local_steps=entry.local_steps,
            perturbations=entry.perturbations,
            batch_size=a.batch_size * entry.batches,
            seed=seed,
            eval_every=a.every,
            **more,
        )

    def rounds(self, entry: Entry) -> int:
        every, rounds = self.arguments.every, self.arguments.rounds * entry.length
        if self.arguments.longest and (entry.perturbations > 5 or entry.length < 1):
            rounds = min(rounds, self.arguments.longest)
        return math.ceil(rounds / every) * every

    def population(self, task: Any, seed: int) -> Any:
        deal = fed.dirichlet_balanced if self.arguments.task == "reviews" else fed.dirichlet
        return deal(task.train["label"], self.arguments.clients, alpha=self.arguments.alpha, seed=seed)

    def tune(self, entry: Entry, schedule: str, target: float) -> dict[str, Any]:
        """The best rate with a schedule, on a grid that grows until the best is inside."""
        seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self.arguments.tuning_seeds)
        populations = [self.population(self.tuning, seed) for seed in seeds]
        rounds, share = self.rounds(entry), entry.make(1e-3).local_share
        tried: dict[float, tuple[float, float]] = {}
        around = [self.arguments.rate * entry.rate * self.arguments.step**power for power in (-1, 0, 1)]
        while around:
            grid = fed.Grid(around, list(seeds), None, lambda rate: SCHEDULES[schedule](share * rate, rounds))
            result = fed.sweep(
                self.tuning,
                lambda rate: entry.make(SCHEDULES[schedule](rate, rounds)),
                populations,
                self.config(entry, 0),
                grid,
            )
            first, final = result.rounds_to(target).mean(0)[0], result.final().mean(0)[0]
            tried |= {rate: (float(first[i]), float(-final[i])) for i, rate in enumerate(around)}
            best = min(tried, key=lambda rate: tried[rate])
            low, high, step = min(tried), max(tried), self.arguments.step
            around = [low / step] if best == low else [high * step] if best == high else []
        listed = {f"{rate:.4g}": tried[rate][0] for rate in sorted(tried)}
        return {"schedule": schedule, "rate": best, "rounds": tried[best][0], "final": -tried[best][1], "tried": listed}

    def run(self, entry: Entry, schedule: str, rate: float, seed: int) -> dict[str, Any]:
        """One seed at the best rate, and its figures at each target."""
        rounds, algorithm = self.rounds(entry), entry.make(SCHEDULES[schedule](rate, self.rounds(entry)))
        local = SCHEDULES[schedule](algorithm.local_share * rate, rounds)
        population = self.population(self.task, seed)
        config = self.config(entry, seed, local_learning_rate=local)
        simulation = fed.Simulation(self.task, algorithm, population, config)
        result = simulation.run()
        curve = [row.metrics["accuracy"] for row in result.metrics]
        times = {name: simulated(name, result, simulation, seed) for name in FLEETS}
        at = {}
        for target in self.arguments.targets.split(","):
            place = fed.first_at_target(curve, float(target))
            row = None if place is None or result.diverged_at is not None else result.metrics[place]
            at[target] = row and {
                "rounds": row.round,
                "bytes_up": row.bytes_up,
                "bytes": row.bytes_up + row.bytes_down,
                "evaluations": row.forward_passes,
                **{f"seconds, {name}": float(seconds[: row.round].sum()) for name, seconds in times.items()},
            }
        return {
            "seed": seed,
            "at": at,
            "final": float(np.mean(curve[-3:])),
            "worst_tenth": None
            if self.arguments.task == "reviews"
            else worst_tenth(self.task, result.params, population),
            "diverged_at": result.diverged_at,
            "curve": [round(value, 4) for value in curve],
            "bytes_up_each": upload_bytes(simulation_costs(simulation, result)),
            "evaluations_each": result.forward_passes / max(1, result.rounds) / config.cohort,
            "offset": offset(result.records.scalars),
            "seconds": result.run_seconds,
        }


def simulation_costs(simulation: fed.Simulation, result: fed.Result) -> Any:
    from hiso_jax.fed.run.prepared import estimator_of
    from hiso_jax.fed.run.programs import costs_of
    from hiso_jax.fed.update import ServerState

    server = ServerState(result.params, result.state)
    return costs_of(
        simulation.algorithm, estimator_of(simulation.algorithm, simulation.config), server, simulation.config
    )


def simulated(name: str, result: fed.Result, simulation: fed.Simulation, seed: int) -> np.ndarray:
    """Seconds of each round for a fleet: the slowest client's time plus the latency."""
    records, costs = result.records, simulation_costs(simulation, result)
    last_synced, _ = last_synced_rounds(
        records.round, records.cohort, records.attendance, simulation.config.cohort * 1000
    )
    missed = records.round[:, None] - np.maximum(last_synced, 0)
    broadcast = missed * costs.broadcast.most
    down = download_bytes(broadcast, last_synced == NEVER_CAME, costs)
    work = Work(
        down.reshape(-1), upload_bytes(costs), costs.passes, directions_made(broadcast, missed, costs).reshape(-1)
    )
    clients = jnp.asarray(records.cohort.reshape(-1))
    each = FLEETS[name].seconds(traits_key(jax.random.key(seed)), clients, jax.tree.map(jnp.float32, work))
    return np.asarray(each).reshape(records.cohort.shape).max(1) + LATENCY[name]


def worst_tenth(task: Any, params: Any, population: Any) -> float:
    """The mean accuracy, on their own training examples, of the tenth of the clients that fare worst."""
    right = np.asarray(jax.jit(fed.make_evaluate(task.metrics))(params, task.train)["accuracy"], np.float64)
    bounds = zip(population.offsets[:-1], population.offsets[1:], strict=True)
    each = sorted(right[population.indices[begin:end]].mean() for begin, end in bounds)
    return float(np.mean(each[: max(1, len(each) // 10)]))


def offset(scalars: Any) -> float | None:
    """The offset that all directions share: |mean| / standard deviation of the scalars, over all rounds and clients."""
    if scalars is None:
        return None
    numbers = np.asarray(jax.jit(jax.vmap(fed.codes.decoded))(scalars), np.float64)
    spread = numbers.std(-1, keepdims=True)
    return float(abs((numbers / np.where(spread > 0, spread, 1)).mean()))


def main(arguments: Arguments) -> None:
    console = Console()
    name = arguments.name or f"{arguments.task}-{arguments.cohort}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{name}.json"
    done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"methods": {}}
    if not arguments.report:
        bench = Bench(arguments, load_task(arguments))
        local = ("data_dir", "out", "methods", "model", "rates", "report")
        setting = {name: str(value) for name, value in vars(arguments).items() if name not in local}
        if done.setdefault("setting", setting) != setting:
            raise SystemExit(f"{path} holds methods of another setting; give --name or --out")
        done["device"], done["jax"] = jax.devices()[0].device_kind, jax.__version__
        target = float(arguments.targets.split(",")[0])
        pairs = [pair.rsplit("=", 1) for pair in arguments.rates.split(";") if pair]
        given = {method: float(rate) for method, rate in pairs}
        for method in filter(None, arguments.methods.split(";")) if arguments.methods else ENTRIES:
            if method in done["methods"]:
                continue
            begin, entry = time.perf_counter(), ENTRIES[method]
            schedules = arguments.schedules.split(",")
            tuned: list[dict[str, Any]]
            if method in given:
                tuned = [{"schedule": schedules[0], "rate": given[method], "rounds": math.inf, "final": math.nan}]
            else:
                tuned = [bench.tune(entry, schedule, target) for schedule in schedules]
            best = min(tuned, key=lambda each: (each["rounds"], -each["final"]))
            runs = [bench.run(entry, best["schedule"], best["rate"], seed) for seed in range(arguments.seeds)]
            done["methods"][method] = {"tuned": tuned, "best": best, "runs": runs}
            path.write_text(json.dumps(done, separators=(",", ":")) + "\n")
            first = [run["at"][arguments.targets.split(",")[0]] for run in runs]
            reached = [each and each["rounds"] for each in first]
            seconds = time.perf_counter() - begin
            console.print(f"{method}: {best['schedule']} {best['rate']:.4g}, rounds {reached}, {seconds:.0f} s")
    report(done, path, console)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
