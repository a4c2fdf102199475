"""Asynchronous rounds beside synchronous ones: simulated seconds, answers and bytes to 0.90 on the digits.

    python benchmarks/asynchronous.py                # half an hour on two cores
    python benchmarks/asynchronous.py --day 200 --buffers 0,5 --exponents "" --out …/asynchronous_days.json

100 clients, Dirichlet 0.5, 20 at work at a time; between the fastest and the slowest 2.5 % of the clients lies a factor
of 20, in computing and in both bandwidths. A synchronous round waits for all 20; a buffer takes the first 10, 5 or 2.
Every setting has its learning rate from one grid, tuned on two seeds of their own by the median of the seconds; a rate
at an end of the grid is reported as such. Five other seeds are paired: the ratios are those of each seed. A target is
reached at the first evaluation whose accuracy, averaged with the next two, is there; evaluations come after equal
numbers of answers.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

import hiso_jax
from hiso_jax import fed, reports, tasks

CLIENTS, COHORT, TARGET, FACTOR = 100, 20, 0.90, 20
# Four standard deviations of the logarithm between the two ends.
SPREAD = math.log(FACTOR) / 4
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mosaic": (hiso_jax.mosaic, {}),
    "decomfl": (hiso_jax.decomfl, {}),
}
GRIDS = {
    "mosaic": (0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
    "decomfl": (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4),
}
# Answers after which a setting has failed, and between evaluations.
ANSWERS = {"mosaic": 4000, "decomfl": 40_000}
EVERY = {"mosaic": 40, "decomfl": 400}


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      methods: comma-separated.
      buffers: comma-separated; 0 is synchronous.
      exponents: staleness exponents to compare at a buffer of 5, comma-separated.
      tuning_seeds, seeds: how many.
      day: seconds of a day, for clients that come by the time of day, each with a time zone of its own: half of them at
        a time, all at its noon, none at its midnight; 0 has all come.
      out: JSON file to write.
    """

    methods: str = ",".join(METHODS)
    buffers: str = "0,10,5,2"
    exponents: str = "0"
    tuning_seeds: int = 2
    seeds: int = 5
    day: float = 0.0
    out: Path = Path("benchmarks/results/asynchronous.json")


def run(method: str, buffer: int, exponent: float, rate: float, seed: int, task: Any, day: float) -> dict[str, float]:
    """Seconds, answers and bytes to the target, infinite if it is not reached; and the mean staleness."""
    each = buffer or COHORT
    config = fed.SimulationConfig(
        rounds=ANSWERS[method] // each,
        cohort=COHORT,
        buffer=buffer or None,
        staleness_exponent=exponent,
        eval_every=EVERY[method] // each,
        seed=seed,
        **METHODS[method][1],
    )
    bandwidth = [fed.LogNormal(megabits * 1e6 / 8, SPREAD) for megabits in (20, 5)]
    comes = fed.Diurnal(0.5, 1.0, day, in_seconds=True) if day else None
    there = fed.Participation(comes, fleet=fed.Fleet(fed.LogNormal(0.1, SPREAD), *bandwidth))
    population = fed.dirichlet(task.train["label"], CLIENTS, alpha=0.5, seed=seed)

    def reached(rows: list[fed.Evaluation]) -> fed.Evaluation | None:
        place = fed.first_at_target([row.metrics["accuracy"] for row in rows], TARGET)
        return None if place is None else rows[place]

    def stop(session: fed.Session, evaluation: fed.Evaluation | None) -> None:
        if reached(session.history) is not None:
            session.stop()

    simulation = fed.Simulation(
        task, METHODS[method][0](rate), population, config, participation=there, callbacks=[fed.Callback(stop)]
    )
    result = simulation.run()
    at = reached(result.metrics)
    stale = (result.staleness or {"mean": 0.0})["mean"]
    if at is None or at.simulated_seconds is None:
        return {"seconds": math.inf, "answers": math.inf, "bytes_up": math.inf, "bytes": math.inf, "staleness": stale}
    return {
        "seconds": at.simulated_seconds,
        "answers": float(at.round * each),
        "bytes_up": float(at.bytes_up),
        "bytes": float(at.bytes_up + at.bytes_down),
        "staleness": stale,
    }


def main(arguments: Arguments) -> None:
    task, console, begin = tasks.digits(), Console(), time.perf_counter()
    rows: list[dict[str, Any]] = []
    for method in arguments.methods.split(","):
        settings = [(int(buffer), 0.5) for buffer in arguments.buffers.split(",")]
        settings += [(5, float(exponent)) for exponent in arguments.exponents.split(",") if exponent]
        for buffer, exponent in settings:
            tried = {
                rate: median(
                    run(method, buffer, exponent, rate, 1000 + seed, task, arguments.day)["seconds"]
                    for seed in range(arguments.tuning_seeds)
                )
                for rate in GRIDS[method]
            }
            rate = min(tried, key=lambda rate: tried[rate])
            at_end = rate in (GRIDS[method][0], GRIDS[method][-1])
            found = [run(method, buffer, exponent, rate, seed, task, arguments.day) for seed in range(arguments.seeds)]
            row = {"method": method, "buffer": buffer, "exponent": exponent, "rate": rate, "at_end": at_end}
            rows.append({**row, "tried": tried, "runs": found})
            whole = next(each for each in rows if each["method"] == method and not each["buffer"])
            if whole is not rows[-1]:
                for name in ("seconds", "answers", "bytes_up", "bytes"):
                    pairs = zip(found, whole["runs"], strict=True)
                    mean = reports.interval([math.log(own[name] / other[name]) for own, other in pairs])
                    rows[-1][f"{name}_ratio"] = [None if each is None else math.exp(each) for each in mean]
            print(
                f"{time.perf_counter() - begin:.0f} s: {row} {[round(each['seconds']) for each in found]}", flush=True
            )
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(
                json.dumps({"factor": FACTOR, "day": arguments.day, "rows": rows}, indent=2) + "\n"
            )
    table = Table(title=f"To {TARGET:g}: medians, and ratios to the synchronous run with 95 % intervals")
    for column in ("method", "buffer", "a", "rate", "staleness", "seconds", "of sync", "answers", "of sync", "bytes"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)


def cells(row: dict[str, Any]) -> list[str]:
    """The row of the table for a setting."""

    def middle(name: str) -> float:
        return median(each[name] for each in row["runs"])

    def of_synchronous(name: str) -> str:
        ratio = row.get(f"{name}_ratio")
        if ratio is None:
            return ""
        mean, low, high = ratio
        return f"{mean:.2f}" if low is None else f"{mean:.2f} ({low:.2f} to {high:.2f})"

    return [
        row["method"],
        str(row["buffer"] or "all"),
        f"{row['exponent']:g}",
        f"{row['rate']:g}" + (" (end)" if row["at_end"] else ""),
        f"{middle('staleness'):.2g}",
        f"{middle('seconds'):.0f}",
        of_synchronous("seconds"),
        f"{middle('answers'):.0f}",
        of_synchronous("answers"),
        f"{middle('bytes') / 1e6:.2f} MB",
    ]


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
