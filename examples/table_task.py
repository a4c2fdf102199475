"""A task of one's own for the command line and ``Experiment``: a table of numbers with a column ``label``.

hiso-jax run --task examples/table_task.py:table --algorithm mosaic --rounds 100
hiso-jax run --task examples/table_task.py:table --csv mine.csv
hiso-jax compare --task examples/table_task.py:table --algorithms decomfl,mosaic --rounds 100 --seeds 2
"""

from pathlib import Path

import jax
import pandas as pd

from hiso_jax import tasks


def digits_table() -> pd.DataFrame:
    """The embedded digits as a table: 64 columns of pixels and a column ``label``; in place of a file of yours."""
    digits = tasks.digits()
    columns = {name: [*digits.train[name], *digits.test[name]] for name in ("input", "label")}
    pixels = pd.DataFrame([image.reshape(-1) for image in columns["input"]]).add_prefix("pixel_")
    return pixels.assign(label=columns["label"])


def table(seed: int, *, csv: Path | None = None, hidden: int = 32) -> tasks.Classification:
    """Classification of the rows of a table by a network with one hidden layer.

    Args:
      csv: a CSV file with columns of numbers and a column label of 0, 1, …; by default the embedded digits.
      hidden: units of the hidden layer.
    """
    frame = digits_table() if csv is None else pd.read_csv(csv)
    test = frame.sample(frac=0.25, random_state=seed)
    features, classes = frame.shape[1] - 1, len(set(frame["label"]))

    def init(key: jax.Array) -> dict[str, jax.Array]:
        first, second = jax.random.split(key)
        return {
            "hidden": jax.random.normal(first, (features, hidden)) / features**0.5,
            "output": jax.random.normal(second, (hidden, classes)) / hidden**0.5,
        }

    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ params["hidden"]) @ params["output"]

    return tasks.Classification(init, apply, train=frame.drop(test.index), test=test, name="table", target=0.85)
