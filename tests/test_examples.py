"""The examples run: the walks of a researcher, of an engineer of language models and of a user of optax."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import hiso_jax
from tests.marks import slow

EXAMPLES = Path(__file__).parents[1] / "examples"
# A GGUF file of SmolLM2, which no test downloads.
MODEL = os.environ.get("HISO_JAX_GGUF")


def run(name, *words, cache):
    """The output of an example in a process of its own, and the seconds of CPU that it took."""
    environment = {**os.environ, "HISO_JAX_CACHE": str(cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    environment.pop("XLA_FLAGS", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, words)], env=environment, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_task_of_the_examples_is_one_for_names():
    experiment = hiso_jax.Experiment(
        task=f"{EXAMPLES / 'table_task.py'}:table", hidden=8, rounds=2, eval_every=2, clients=10, cohort=2
    )
    assert experiment.task.train["input"].shape == (1348, 64)
    assert len(experiment.run().metrics) == 2


@pytest.mark.parametrize("name", [slow("table_sweep.py")])
def test_a_sweep_of_a_table_takes_two_minutes_of_cpu_with_an_empty_cache(name, tmp_path):
    text, seconds = run(name, tmp_path / "figure", cache=tmp_path / "cache")
    assert text.count("seed") == 27
    assert (tmp_path / "figure.pdf").stat().st_size > 5000
    assert len((tmp_path / "figure.csv").read_text().splitlines()) == 27 * 11 + 1
    assert seconds < 120


@pytest.mark.slow
def test_the_optimizer_learns_in_every_setting(tmp_path):
    plain, _ = run("optimizer.py", cache=tmp_path / "cache")
    modules, _ = run("optimizer_nnx.py", cache=tmp_path / "cache")
    lines = [*plain.splitlines(), *modules.splitlines()]
    assert [line.partition(":")[0] for line in lines] == ["scan", "orbax", "flax.nnx", "8 devices"]
    assert float(lines[0].split()[-1]) < 0.6
    assert lines[1].endswith("True")
    assert float(lines[2].split()[-1]) > 0.85
    assert float(lines[3].split()[3].rstrip(",")) < 0.8


@pytest.mark.slow
def test_a_method_of_ones_own_is_compared(tmp_path):
    text, _ = run("own_method.py", "--out", tmp_path / "compared", cache=tmp_path / "cache")
    assert "clipped" in text
    assert (tmp_path / "compared" / "report.html").stat().st_size > 900_000


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path


@pytest.mark.skipif(MODEL is None, reason="HISO_JAX_GGUF names no file of SmolLM2")
@pytest.mark.parametrize("name", [slow("language_model.py")])
def test_a_language_model_learns_four_labels(name, tmp_path):
    text, _ = run(name, "--model", MODEL, "--out", tmp_path / "topics", cache=tmp_path / "cache")
    assert "chat template: kept" in text
    lines = [line for line in text.splitlines() if "→" in line]
    assert len(lines) == 8
    assert sum(line.partition("→")[2].split()[0] in line.partition("(is ")[2] for line in lines) >= 6
