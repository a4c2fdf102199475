"""Methods × similarity of the clients × seeds on a table of one's own, with a figure for a paper.

    python examples/table_sweep.py --out figure

It writes figure.csv, a row for each evaluation of each run, and figure.pdf. About a minute on two cores: runs of one
method share one compiled program, whatever their seed and clients are.
"""

import argparse

import matplotlib.pyplot as plt
import pandas as pd
from table_task import table

import hiso_jax
from hiso_jax import algorithms, fed

# Name in the figure → the method at its rate, and the rounds to run.
METHODS = {
    "DeComFL, 5 floats": (algorithms.decomfl(0.05), 300),
    "mosaic, 64 × 2 bits": (algorithms.mosaic(0.5), 60),
    "local steps, 128 × 1 bit": (algorithms.local_mosaic(4.0), 30),
}
ALPHAS = (0.1, 1.0, 100.0)
SEEDS = (0, 1, 2)


def sweep() -> pd.DataFrame:
    """A row for each evaluation of each run."""
    task, frames = table(seed=0), []
    for name, (algorithm, rounds) in METHODS.items():
        for alpha in ALPHAS:
            for seed in SEEDS:
                population = fed.dirichlet(task.train["label"], 50, alpha=alpha, seed=seed)
                config = fed.SimulationConfig(rounds=rounds, cohort=8, eval_every=rounds // 10, seed=seed)
                result = hiso_jax.Simulation(task, algorithm, population, config).run()
                frames.append(result.to_pandas().assign(method=name, alpha=alpha, seed=seed))
                print(f"{name}, α = {alpha:g}, seed {seed}: {result.metrics[-1].metrics['accuracy']:.3f}")
    return pd.concat(frames, ignore_index=True)


def draw(rows: pd.DataFrame, path: str) -> None:
    """Accuracy against bytes up of a client that was in every round: means of the seeds and their range."""
    figure, panels = plt.subplots(1, len(ALPHAS), figsize=(9, 3), sharey=True, layout="constrained")
    for panel, alpha in zip(panels, ALPHAS, strict=True):
        for name in METHODS:
            # The first evaluation, before any byte, has no place on a logarithmic axis.
            mine = rows[(rows["alpha"] == alpha) & (rows["method"] == name) & (rows["round"] > 0)]
            by_round = mine.assign(bytes_up=20 * mine["round"]).groupby("bytes_up")["accuracy"]
            x = list(by_round.groups)
            panel.plot(x, by_round.mean(), label=name)
            panel.fill_between(x, by_round.min(), by_round.max(), alpha=0.2)
        panel.set(title=f"Dirichlet {alpha:g}", xlabel="bytes up of a client", xscale="log")
    panels[0].set_ylabel("test accuracy")
    panels[0].legend(fontsize="small")
    figure.savefig(path)


def main() -> None:
    """Run the sweep and write the table and the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="figure", help="name of the files without their endings")
    out = parser.parse_args().out
    rows = sweep()
    rows.to_csv(f"{out}.csv", index=False)
    draw(rows, f"{out}.pdf")
    print(f"written to {out}.csv and {out}.pdf")


if __name__ == "__main__":
    main()
