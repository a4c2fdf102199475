"""Runs of one process share programs: other seeds, populations and learning rates need no compilation."""

from collections import OrderedDict
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

import hiso_jax
from hiso_jax import algorithms, fed, program_cache, tasks
from tests.fed.problems import assert_trees_identical, linear_task
from tests.marks import thorough

LOCAL = dict(local_steps=2, local_learning_rate=0.1)


@pytest.fixture
def programs(monkeypatch):
    """The programs that this process keeps, none at first."""
    kept = OrderedDict()
    monkeypatch.setattr(program_cache, "_kept", kept)
    return kept


def run(algorithm, seed=0, alpha=0.5, task=None, **options):
    task = task or tasks.digits()
    population = fed.dirichlet(task.train["label"], 20, alpha=alpha, seed=seed)
    config = fed.SimulationConfig(rounds=4, cohort=4, eval_every=2, seed=seed, **options)
    return fed.Simulation(task, algorithm, population, config).run()


def test_seeds_populations_and_rates_share_programs(programs):
    for seed, alpha, rate in ((0, 0.5, 0.03), (1, 0.5, 0.03), (1, 0.1, 0.03), (1, 0.1, 0.02)):
        result = run(algorithms.decomfl(rate), seed, alpha)
        params, _ = hiso_jax.replay(result.initial_params, algorithms.decomfl(rate), result.records)
        jax.tree.map(np.testing.assert_array_equal, params, result.params)
    # A dispatch and an evaluation.
    assert len(programs) == 2


def test_rates_of_the_clients_steps_share_programs(programs):
    first = run(algorithms.decomfl(0.03), **LOCAL)
    second = run(algorithms.decomfl(0.03), **{**LOCAL, "local_learning_rate": 0.01})
    assert len(programs) == 2
    assert not np.array_equal(*(jax.tree.leaves(result.params)[0] for result in (first, second)))


def test_other_methods_do_not_share_programs(programs):
    run(algorithms.decomfl(0.03))
    run(algorithms.decomfl(0.03, momentum=0.5))
    # The evaluation is the same.
    assert len(programs) == 3


def test_only_so_many_programs_are_kept(programs, monkeypatch):
    monkeypatch.setattr(program_cache, "KEPT", 3)
    for momentum in (0.0, 0.1, 0.2, 0.3):
        run(algorithms.decomfl(0.03, momentum=momentum))
    assert len(programs) == 3


def test_an_optimizer_of_optax_keeps_its_own_rate(programs):
    """Its rate is in its closures, so each rate is a program."""
    run(hiso_jax.decomfl(0.03))
    run(hiso_jax.decomfl(0.02))
    assert len(programs) == 3


@pytest.mark.parametrize("name", algorithms.NAMES)
def test_a_method_at_another_rate_is_the_method_made_with_it(name):
    method = algorithms.load(name)
    again = method.build(0.5, {}).at(0.25)
    assert again.part_digests == method.build(0.25, {}).part_digests
    assert again.part_digests != method.build(0.5, {}).part_digests


def test_replaced_parts_are_kept_at_another_rate():
    changed = replace(algorithms.decomfl(0.5), combine=fed.Combine(lambda messages, weights, memory: messages))
    assert changed.at(0.1).combine is changed.combine
    chained = replace(algorithms.decomfl(0.5), tx=optax.chain(algorithms.decomfl(0.5).tx, optax.clip(1.0)))
    assert chained.at(0.1).tx is chained.tx


def test_a_method_of_the_user_never_gets_a_traced_rate(tmp_path):
    """Its code may read the digits of a rate."""
    (tmp_path / "mine.py").write_text(
        "from hiso_jax import algorithms\n"
        "def mine(learning_rate):\n"
        "    return algorithms.decomfl(min(learning_rate, 0.01))\n"
    )
    method = algorithms.load(f"{tmp_path}/mine.py:mine")
    low, high = (run(method.build(rate, {})).params for rate in (0.01, 0.5))
    jax.tree.map(np.testing.assert_array_equal, low, high)


FAST = ("decomfl",)


@pytest.mark.parametrize("name", [name if name in FAST else thorough(name) for name in algorithms.NAMES])
def test_a_rate_as_an_argument_gives_the_bits_of_a_constant(name):
    """Without its recipe, the rate of a method is a constant of the program."""
    method = algorithms.load(name)
    algorithm = method.build(method.rate("digits") or 0.01, {})
    both = [run(each, task=linear_task()) for each in (algorithm, replace(algorithm, recipe=None))]
    assert_trees_identical(both[0].params, both[1].params)
    assert_trees_identical(both[0].state, both[1].state)
