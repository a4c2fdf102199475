"""Past updates as directions: is projecting on them (ProjFL, arXiv 2511.05593) worth the memory? A look at the digits.

    python benchmarks/past_directions.py

Everyone who replays a ledger knows the last H updates of the model, so projections on them need no seeds. A client
sends its progress along an orthonormal basis of these updates exactly, and along P − H random signs, orthogonal to the
basis, in one bit each. The script prints the share of the progress that the past updates hold, and the rounds to an
accuracy of 0.90 for several H. It simulates the method in NumPy, outside the package: 100 clients, 10 a round,
Dirichlet 0.5, 5 local steps, batch 32, P = 128; the best server's rate of five, on the reported seeds themselves.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.flatten_util import ravel_pytree

from hiso_jax import fed, tasks

CLIENTS, COHORT, STEPS, BATCH, LOCAL_RATE, DIRECTIONS, TARGET = 100, 10, 5, 32, 0.6, 128, 0.9
RATES = (2.0, 3.0, 4.5, 6.0, 9.0)


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      seeds: number of seeds, from 0.
      rounds: rounds of every run.
    """

    seeds: int = 3
    rounds: int = 40


class Run(NamedTuple):
    """The result of a run.

    Attributes:
      shares: share of the mean progress that lies in the span of the last 20 updates, by round; NaN before.
      accuracy: test accuracy after every round.
    """

    shares: np.ndarray
    accuracy: np.ndarray


def simulate(seed: int, rate: float, past: int, rounds: int) -> Run:
    """One run in which ``past`` updates are directions."""
    task = tasks.digits()
    train, test = (jax.tree.map(jnp.asarray, part) for part in (task.train, task.test))
    population = fed.dirichlet(task.train["label"], CLIENTS, alpha=0.5, seed=seed)
    start, unravel = ravel_pytree(task.init(jax.random.key(seed)))

    def progress(x: jax.Array, rows: jax.Array) -> jax.Array:
        def step(carry: tuple[jax.Array, jax.Array], own: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            batch = jax.tree.map(lambda leaf: leaf[own], train)
            gradient = jax.grad(lambda x: task.loss(unravel(x), batch).mean())(carry[0])
            return (carry[0] - LOCAL_RATE * gradient, carry[1] + gradient), None

        return jax.lax.scan(step, (x, jnp.zeros_like(x)), rows)[0][1] / STEPS

    of_clients = jax.jit(jax.vmap(progress, (None, 0)))
    accuracy_of = jax.jit(lambda x: task.metrics(unravel(x), test)["accuracy"].mean())
    rng, x = np.random.default_rng(seed), start
    updates: list[np.ndarray] = []
    shares, accuracy = [], []
    for number in range(rounds):
        invited = jnp.asarray(rng.choice(CLIENTS, COHORT, replace=False))
        rows = population.sample(jax.random.key(1000 * seed + number), invited, (STEPS, BATCH))
        each = np.asarray(of_clients(x, rows), np.float64)
        mean, share = each.mean(0), np.nan
        if len(updates) >= 20:
            known, _ = np.linalg.qr(np.stack(updates[-20:]).T)
            share = ((known.T @ mean) ** 2).sum() / (mean @ mean)
        basis = np.linalg.qr(np.stack(updates[-past:]).T)[0] if past and updates else np.zeros((len(mean), 0))
        delta = np.zeros(len(mean))
        for own in each:
            exact = basis.T @ own
            rest, count = own - basis @ exact, DIRECTIONS - basis.shape[1]
            signs = rng.choice([-1.0, 1.0], size=(count, len(mean)))
            signs -= signs @ basis @ basis.T
            scalars = signs @ rest
            coded = np.sign(scalars) * np.abs(scalars).mean()
            delta += (basis @ exact + signs.T @ coded / count) / COHORT
        updates.append(rate * delta)
        x = x - jnp.asarray(rate * delta, x.dtype)
        shares.append(share)
        accuracy.append(float(accuracy_of(x)))
    return Run(np.array(shares), np.array(accuracy))


def main(arguments: Arguments) -> None:
    shares = simulate(0, 6.0, 0, arguments.rounds).shares
    size = ravel_pytree(tasks.digits().init(jax.random.key(0)))[0].size
    held = f"the last 20 updates hold {np.nanmean(shares):.3f} of a round's mean progress"
    print(f"{held}; 20 random vectors would hold {20 / size:.3f}")
    for past in (0, 1, 5, 20):
        means = {}
        for rate in RATES:
            runs = [simulate(seed, rate, past, arguments.rounds).accuracy for seed in range(arguments.seeds)]
            reached = [int(np.argmax(run >= TARGET)) + 1 if run.max() >= TARGET else np.inf for run in runs]
            means[rate] = np.mean(reached)
        best = min(means, key=lambda rate: means[rate])
        print(f"{past:2} past updates: {means[best]:.1f} rounds to {TARGET:g}, at rate {best:g}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__.split("\n")[0]))
