"""What goes between clients and server: to the byte what is counted, and enough to rebuild the server, to the bit."""

import jax
import numpy as np
import optax
import pytest

import hiso_jax
from hiso_jax import algorithms, fed
from hiso_jax.fed.ledger import (
    catch_up,
    catch_up_by_sums,
    catch_up_message,
    form_of,
    sums_message,
    upload_message,
)
from hiso_jax.fed.population import ABSENT, DROPPED
from hiso_jax.fed.run.traffic import stood_at
from tests.fed.problems import assert_trees_identical, digits_population, linear_task, optimizers

ROUNDS = 24


def played(tx, rounds=ROUNDS, **settings):
    config = fed.SimulationConfig(
        rounds=rounds, cohort=4, batch_size=8, eval_every=rounds, perturbations=2, local_learning_rate=0.01, **settings
    )
    rules = fed.Participation(availability=fed.Bernoulli(0.3), dropout=0.2)
    return fed.Simulation(linear_task(), tx, digits_population(), config, participation=rules).run()


def methods():
    return {
        **optimizers(),
        "own": hiso_jax.mosaic(0.1, scalar_bits=2),
        "one bit in two groups": hiso_jax.mosaic(0.1, scalar_bits=1, direction_groups=2, relay="messages"),
        "aggregate": hiso_jax.mosaic(0.1, scalar_bits=4, relay="aggregate"),
        "few bits both ways": hiso_jax.mosaic(0.1, scalar_bits=4, direction_groups="shared", aggregate_bits=4),
        "floats": hiso_jax.mosaic(0.1, scalar_bits=32),
    }


SLOW = ["hiso-all", "few bits both ways", "momentum", "one bit in two groups", "aggregate", "floats"]


@pytest.mark.parametrize(
    "name",
    ["own", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def test_clients_that_join_at_random_rounds_catch_up_to_the_last_bit(name):
    """Every visit of the run: the client replays what it missed from the bytes it is sent, and is where the server is.

    Rounds in which nobody came are among what they miss: nothing was applied then.
    """
    method = methods()[name]
    tx, grouped = (
        fed.algorithm.as_algorithm(method).optimizer,
        name in ("own", "one bit in two groups", "aggregate", "floats"),
    )
    result = played(method, local_steps=2)
    updates, records = result.records.updates, result.records
    assert not updates.applied.all()
    server = {0: (result.initial_params, tx.init(result.initial_params))}
    for number in range(ROUNDS):
        # One round after the other, as the server made them.
        params, state = server[number]
        server[number + 1] = fed.replay(params, tx, updates.between(number, number + 1), state=state)
    assert_trees_identical(server[ROUNDS], (result.params, result.state))

    stood, _ = stood_at(records.round, records.cohort, records.attendance, 12)
    clients, down, up = {}, 0, 0
    for number in range(ROUNDS):
        for place in range(4):
            client, status = int(records.cohort[number, place]), records.attendance[number, place]
            if status == ABSENT:
                continue
            synced, before = int(stood[number, place]), clients.get(client)
            assert (before is None) == (synced == -1)
            message = catch_up_message(
                updates,
                None if before is None else synced,
                number,
                server[number],
                group=place if grouped else None,
            )
            down += len(message)
            params, state, key = before or (*server[0], None)
            form = form_of(updates.aggregate)
            clients[client] = catch_up(message, params, state, tx, form=form, clients=4, grouped=grouped, seed_key=key)
            assert_trees_identical(clients[client][:2], server[number])
            if status != DROPPED:
                sent = jax.tree.map(lambda x, at=(number, place): x[at], records.scalars)
                up += len(upload_message(sent, number, place))
    assert down == result.traffic["bytes_down"]
    assert up == result.traffic["bytes_up"]
    assert len(clients) == result.traffic["participants"]


@pytest.mark.parametrize("groups", ["own", pytest.param("shared", marks=pytest.mark.thorough)])
def test_rounds_along_a_pool_are_told_as_a_sum_a_seed(groups):
    schedule = optax.linear_schedule(0.05, 0.01, ROUNDS)
    method = algorithms.load("fed_kseed").build(
        schedule, {"pool_seeds": 40, "direction_groups": groups, "guard": False}
    )
    result = played(method, local_steps=2)
    updates, tx = result.records.updates, method.optimizer
    assert not updates.applied.all()
    start = result.initial_params, tx.init(result.initial_params)
    server = {0: start, 15: fed.replay(start[0], tx, updates.between(0, 15)), ROUNDS: (result.params, result.state)}
    client, key = start, None
    for before, number in ((None, 15), (15, ROUNDS)):
        message = sums_message(updates, before, number, method, start[0])
        assert len(message) == 8 + 8 * (key is None) + 4 + 4 * 40
        *client, key = catch_up_by_sums(message, *client, method, seed_key=key)
        assert_trees_identical(client[1], server[number][1])
        moved = jax.tree.map(lambda x, y: float(abs(x - y).max()), start[0], server[number][0])
        assert min(jax.tree.leaves(moved)) > 1e-3
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), client[0], server[number][0])


def test_only_rounds_of_plain_descent_along_a_pool_are_sums():
    updates = fed.Updates(jax.random.key(0), np.arange(1), np.ones((1, 1, 1), np.float32), np.ones(1, bool))
    for method in (
        algorithms.decomfl(0.1),
        algorithms.load("fed_kseed").build(0.1, {"direction_groups": 2, "direction_blocks": 4}),
    ):
        with pytest.raises(ValueError, match="algorithm must be plain descent along the directions of a pool"):
            sums_message(updates, None, 1, method, {"w": np.zeros(3, np.float32)})


@pytest.mark.parametrize(("perturbations", "bits"), [(16, 8), (32, 4), (64, 2), (128, 1)])
def test_twenty_bytes_hold_the_whole_plane_of_directions_and_bits(perturbations, bits):
    message = fed.codes.quantise(jax.random.normal(jax.random.key(0), (1, 1, perturbations)), bits)
    alone = jax.tree.map(lambda x: np.asarray(x[0]), message)
    assert len(upload_message(alone, 7, 3)) == 8 + 4 + 16
    assert hiso_jax.mosaic(0.1).wire.bits_of(perturbations) == bits


def test_who_missed_more_than_a_checkpoint_is_sent_one():
    tx = hiso_jax.decomfl(0.02)
    params = {"w": np.arange(3, dtype=np.float32)}
    updates = fed.Updates(
        jax.random.key(7), np.arange(50, dtype=np.int32), np.ones((50, 1, 1), np.float32), np.ones(50, bool)
    )
    server = fed.replay(params, tx, updates)
    message = catch_up_message(updates, 3, 50, server)
    assert len(message) == 8 + sum(leaf.nbytes for leaf in jax.tree.leaves(server))
    form = form_of(updates.aggregate)
    caught = catch_up(message, params, tx.init(params), tx, form=form, seed_key=jax.random.key(7))
    assert_trees_identical(caught[:2], server)


def test_a_message_of_other_numbers_than_it_can_hold_is_refused():
    updates = fed.Updates(jax.random.key(0), np.arange(1), np.ones((1, 1, 1), np.float64), np.ones(1, bool))
    with pytest.raises(ValueError, match="got float64"):
        catch_up_message(updates, None, 1, ({}, {}))
