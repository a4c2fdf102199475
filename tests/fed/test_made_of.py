"""A method is identified by its functions and their numbers, and no run continues with another method's."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hiso_jax
from hiso_jax import algorithms, channels, fed
from hiso_jax.fed.part_digests import digest
from tests.callbacks import StopAt
from tests.fed.problems import digits_population, linear_task
from tests.marks import thorough


@pytest.mark.parametrize("name", algorithms.NAMES)
def test_a_method_is_known_again_and_told_from_one_of_another_rate(name):
    build = algorithms.load(name).build
    assert build(0.01, {}).part_digests == build(0.01, {}).part_digests
    schedules = [optax.cosine_decay_schedule(0.01, steps) for steps in (100, 101)]
    for one, other in ((0.01, 0.0100001), (0.01, np.float32(0.01)), schedules):
        assert build(one, {}).part_digests != build(other, {}).part_digests


class Warmup:
    def __init__(self, rate):
        self.rate = rate

    def __call__(self, count):
        return self.rate * count


def scaled(rate, count, *, power=1.0):
    return rate * count**power


@pytest.mark.parametrize(
    "make",
    [
        lambda x: channels.trimmed_mean(trim=x),
        lambda x: channels.multi_krum(hostile=x),
        lambda x: channels.clip(clip_norm=x),
        lambda x: channels.sign_flip(attack_scale=x),
        lambda x: fed.FewBits(bytes_up=round(100 * x)),
        lambda x: hiso_jax.hiso(0.1, decay=x),
        lambda x: jax.jit(lambda count: x * count),
        lambda x: functools.partial(scaled, x),
        lambda x: functools.partial(scaled, power=x),
        lambda x: lambda count, rate=x: rate * count,
        lambda x: Warmup(x).__call__,
        Warmup,
        lambda x: {"rate": [jnp.float32(x)]},
        lambda x: np.array([x, 1.0]),
        lambda x: jax.random.key(round(100 * x)),
    ],
)
def test_numbers_are_found_wherever_they_are_held(make):
    assert digest(make(0.25)) == digest(make(0.25))
    assert digest(make(0.25)) != digest(make(0.26))


def test_a_number_in_a_body_counts_and_a_circle_ends():
    assert digest(lambda count: 0.1) != digest(lambda count: 0.2)
    circle: list = [0.1]
    circle.append(circle)
    assert digest(circle) == digest(circle)


@pytest.mark.thorough
def test_another_process_finds_the_same():
    code = "from hiso_jax import algorithms as a; print(a.load('mosaic').build(0.1, {}).part_digests)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(algorithms.load("mosaic").build(0.1, {}).part_digests)


def trained_by(algorithm, storage, rounds=6, stop_at=None, **settings):
    config = fed.SimulationConfig(
        rounds=rounds, cohort=4, perturbations=2, batch_size=8, eval_every=6, rounds_per_dispatch=1, **settings
    )
    run = fed.Simulation(linear_task(), algorithm, digits_population(), config, storage=storage)
    run.callbacks = (StopAt(stop_at),)
    return run.run()


def trimmed(share):
    return fed.Algorithm(hiso_jax.decomfl(0.01), combine=channels.trimmed_mean(trim=share))


@pytest.mark.parametrize(
    ("one", "other", "part"),
    [
        (hiso_jax.decomfl(0.01), hiso_jax.decomfl(0.5), "optimizer"),
        thorough(algorithms.fed_avg(0.1), algorithms.fed_avg(5.0), "measure|optimizer"),
        thorough(trimmed(0.2), trimmed(0.0), "combine"),
    ],
)
def test_no_run_goes_on_with_another_ones_numbers(tmp_path, one, other, part):
    """A snapshot at the last round of the ledger leaves no round to replay as a check."""
    trained_by(one, fed.Storage(tmp_path / "run", snapshot_every=2), stop_at=4)
    again = fed.Storage(tmp_path / "run", snapshot_every=2, resume=True)
    with pytest.raises(ValueError, match=f"cannot be continued: its ({part}) is made of other functions or numbers"):
        trained_by(other, again)
    assert trained_by(one, again).rounds == 6


@pytest.mark.thorough
def test_nor_with_another_schedule_of_the_clients_own_steps(tmp_path):
    schedules = [optax.constant_schedule(rate) for rate in (0.01, 1.0)]
    settings = [{"local_steps": 2, "local_learning_rate": schedule} for schedule in schedules]
    tx = hiso_jax.decomfl(0.01)
    trained_by(tx, fed.Storage(tmp_path / "run", snapshot_every=2), stop_at=4, **settings[0])
    with pytest.raises(ValueError, match="its local learning rate is made of other functions or numbers"):
        trained_by(tx, fed.Storage(tmp_path / "run", resume=True), **settings[1])
