"""Compiled programs are kept between commands."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hiso_jax import program_cache as cache

SHOW = """
import json, jax
from hiso_jax import program_cache as cache
cache.keep_compiled()
folder = jax.config.jax_compilation_cache_dir
jax.jit(lambda x: (x @ x).sum() + 1, compiler_options={})(jax.numpy.ones((3, 3))).block_until_ready()
print(json.dumps(folder))
"""


def folder_with(**variables):
    """The folder of JAX's compiled programs in a process with these environment variables."""
    dropped = ("JAX_COMPILATION_CACHE_DIR", cache.VARIABLE)
    environment = {name: value for name, value in os.environ.items() if name not in dropped} | variables
    done = subprocess.run([sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_its_folder_is_the_users_own_and_apart_for_processor_and_jaxlib(tmp_path):
    folder = Path(folder_with(HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache")))
    assert folder.is_relative_to(tmp_path)
    assert folder.name.startswith("jaxlib-")
    assert cache.processor() in folder.name
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.thorough
def test_it_may_be_moved_or_turned_off(tmp_path):
    assert Path(folder_with(HISO_JAX_CACHE=str(tmp_path / "here"))).parent == tmp_path / "here"
    assert folder_with(HISO_JAX_CACHE="off") is None
    assert folder_with(JAX_COMPILATION_CACHE_DIR=str(tmp_path), HISO_JAX_CACHE="x") == str(tmp_path)


LIBRARY = """
import jax
from hiso_jax import fed, hiso, tasks
jax.jit(lambda x: x + 1)(1.0)
{own}
task = tasks.digits()
population = fed.dirichlet(task.train["label"], 20, alpha=0.5)
config = fed.SimulationConfig(rounds=2, cohort=2, perturbations=1, eval_every=2)
fed.Simulation(task, hiso(0.01), population, config).run()
"""


@pytest.mark.thorough
def test_simulations_of_a_program_are_kept_unless_it_has_a_cache_of_its_own(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["HISO_JAX_CACHE"] = str(tmp_path / "ours")

    def run(own):
        subprocess.run([sys.executable, "-c", LIBRARY.format(own=own)], env=environment, check=True)

    run("jax.config.update('jax_enable_compilation_cache', False)")
    assert not (tmp_path / "ours").exists()
    run(f"jax.config.update('jax_compilation_cache_dir', {str(tmp_path / 'own')!r})")
    assert not (tmp_path / "ours").exists()
    run("")
    # Also in a program that had compiled something before.
    assert list((tmp_path / "ours").rglob("*-cache"))


def test_a_home_that_cannot_be_written_is_no_trouble(tmp_path):
    (tmp_path / "file").write_text("")
    assert folder_with(HISO_JAX_CACHE=str(tmp_path / "file" / "below")) is None


def test_another_processor_has_another_folder(monkeypatch):
    one = cache.processor()
    monkeypatch.setattr(cache.platform, "processor", lambda: "another")
    assert cache.processor() != one


@pytest.mark.slow
def test_a_second_run_finds_its_programs_compiled(tmp_path):
    """A second command reaches its first rounds in less than half the time."""
    import time

    def first_rounds(name):
        command = [sys.executable, "-m", "hiso_jax.cli.main", "run", "--rounds", "50", "--out", str(tmp_path / name)]
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        environment |= {"HISO_JAX_CACHE": str(tmp_path / "cache"), "PYTHONUNBUFFERED": "1"}
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            seconds = next(time.perf_counter() - begin for line in process.stdout if "round 50/50" in line)
        return seconds

    cold = first_rounds("cold")
    assert min(first_rounds(f"warm{number}") for number in range(3)) < cold / 2
