"""Methods × similarity of the clients × seeds on a table of one's own, with a figure for a paper (about a minute)."""

import sys
from itertools import product

import matplotlib.pyplot as plt
import pandas as pd
from table_task import table

import hiso_jax
from hiso_jax import algorithms, fed

# Name → the method at its rate, and its rounds.
METHODS = {
    "DeComFL, 5 floats": (algorithms.decomfl(0.05), 300),
    "mosaic, 64 × 2 bits": (algorithms.mosaic(0.5), 60),
    "local steps, 128 × 1 bit": (algorithms.local_mosaic(4.0), 30),
}
ALPHAS, SEEDS = (0.1, 1.0, 100.0), (0, 1, 2)


def sweep() -> pd.DataFrame:
    """A row for each evaluation of each run."""
    task, frames = table(seed=0), []
    for name, alpha, seed in product(METHODS, ALPHAS, SEEDS):
        algorithm, rounds = METHODS[name]
        population = fed.dirichlet(task.train["label"], 50, alpha=alpha, seed=seed)
        config = fed.SimulationConfig(rounds=rounds, cohort=8, eval_every=rounds // 10, seed=seed)
        result = hiso_jax.Simulation(task, algorithm, population, config).run()
        frames.append(result.to_pandas().assign(method=name, alpha=alpha, seed=seed))
        print(f"{name}, α = {alpha:g}, seed {seed}")
    return pd.concat(frames, ignore_index=True)


def draw(rows: pd.DataFrame, path: str) -> None:
    """Accuracy against bytes up of a client that was in every round: means of the seeds and their range."""
    figure, panels = plt.subplots(1, len(ALPHAS), figsize=(9, 3), sharey=True, layout="constrained")
    for panel, alpha in zip(panels, ALPHAS, strict=True):
        for name in METHODS:
            mine = rows[(rows["alpha"] == alpha) & (rows["method"] == name) & (rows["round"] > 0)]
            by_round = mine.assign(bytes_up=20 * mine["round"]).groupby("bytes_up")["accuracy"]
            panel.plot(list(by_round.groups), by_round.mean(), label=name)
            panel.fill_between(list(by_round.groups), by_round.min(), by_round.max(), alpha=0.2)
        panel.set(title=f"Dirichlet {alpha:g}", xlabel="bytes up of a client", xscale="log")
    panels[0].set_ylabel("test accuracy")
    panels[0].legend(fontsize="small")
    figure.savefig(path)


def main() -> None:
    """Run the sweep and write the table and the figure."""
    out, rows = (sys.argv[1:] or ["figure"])[0], sweep()
    rows.to_csv(f"{out}.csv", index=False)
    draw(rows, f"{out}.pdf")


if __name__ == "__main__":
    main()
