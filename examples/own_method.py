"""A method of one's own in a file, and its comparison with DeComFL.

hiso-jax run --algorithm examples/own_method.py:clipped --limit 0.5 --rounds 100
python examples/own_method.py --out compared
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from hiso_jax import fed, tune, zo


def clip_scalars(limit: float) -> optax.GradientTransformation:
    """Clip the aggregated scalars at ``limit`` times their root mean square. Before the head, a chain sees scalars."""

    def clip(scalars: jax.Array) -> jax.Array:
        bound = limit * jnp.sqrt(jnp.mean(scalars**2))
        return jnp.clip(scalars, -bound, bound)

    return optax.stateless(lambda scalars, params: jax.tree.map(clip, scalars))


@fed.algorithm.default_rates(digits=0.05)
def clipped(learning_rate: optax.ScalarOrSchedule, *, limit: float = 1.0) -> fed.Algorithm:
    """DeComFL whose largest scalars are clipped.

    Args:
      learning_rate: η.
      limit: the largest scalar, in root mean squares of all.
    """
    return fed.Algorithm(
        optax.chain(clip_scalars(limit), zo.scale_by_zo(), optax.scale_by_learning_rate(learning_rate))
    )


def main() -> None:
    """Tune both with as many runs, compare them, and write a report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("compared"), help="directory of the comparison")
    given = parser.parse_args()
    numbers = {"rounds": 150, "eval_every": 10, "target": 0.5, "seeds": 2, "tries": 3, "tuning_seeds": 1}
    found = tune.compare(
        ["decomfl", f"{__file__}:clipped"], out=given.out, schedules=["constant"], watcher=tune.Progress(), **numbers
    )
    print(found)
    print(f"written to {given.out}/report.html")


if __name__ == "__main__":
    main()
