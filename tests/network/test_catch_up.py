"""Messages between clients and server: they have the counted bytes, and rebuild the server to the bit."""

import jax
import numpy as np
import optax
import pytest

import hiso_jax
from hiso_jax import algorithms, fed
from hiso_jax.fed.population import ABSENT, DROPPED
from hiso_jax.fed.run.traffic import last_synced_rounds
from hiso_jax.network.catch_up import catch_up, catch_up_message, form_of, upload_message
from tests.fed.problems import assert_trees_identical, digits_population, linear_task, optimizers
from tests.marks import slow, thorough

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
    [thorough("own"), *(slow(name) for name in SLOW)],
)
def test_clients_that_join_at_random_rounds_catch_up_to_the_last_bit(name):
    """At every visit the client replays the rounds that it missed from the bytes it receives, and equals the server.

    The missed rounds include rounds without clients, in which nothing was applied.
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
        # The rounds are replayed one by one, as the server computed them.
        params, state = server[number]
        server[number + 1] = fed.replay(params, tx, updates.between(number, number + 1), state=state)
    assert_trees_identical(server[ROUNDS], (result.params, result.state))

    last_synced, _ = last_synced_rounds(records.round, records.cohort, records.attendance, 12)
    clients, down, up = {}, 0, 0
    for number in range(ROUNDS):
        for place in range(4):
            client, status = int(records.cohort[number, place]), records.attendance[number, place]
            if status == ABSENT:
                continue
            synced, before = int(last_synced[number, place]), clients.get(client)
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


@pytest.mark.thorough
@pytest.mark.parametrize("groups", ["own", thorough("shared")])
def test_rounds_along_a_pool_are_told_as_a_sum_a_seed_where_that_is_least(groups):
    """At every visit the client equals the server up to rounding, also if it receives a sum for each seed."""
    schedule = optax.linear_schedule(0.05, 0.01, ROUNDS)
    method = algorithms.load("fed_kseed").build(schedule, {"pool_seeds": 7, "direction_groups": groups, "guard": False})
    result = played(method, local_steps=2)
    updates, records, tx = result.records.updates, result.records, method.optimizer
    assert not updates.applied.all()
    start = result.initial_params, tx.init(result.initial_params)
    server = [fed.replay(start[0], tx, updates.between(0, number)) for number in range(ROUNDS)]
    last_synced, _ = last_synced_rounds(records.round, records.cohort, records.attendance, 12)
    clients, kinds, down = {}, [], 0
    for number, place in np.argwhere(records.attendance != ABSENT).tolist():
        client, synced = int(records.cohort[number, place]), int(last_synced[number, place])
        params, state, key = clients.get(client, (*start, None))
        group = place if groups == "own" else None
        known = None if key is None else synced
        message = catch_up_message(updates, known, number, server[number], group=group, algorithm=method)
        form = form_of(updates.aggregate)
        own = {"form": form, "clients": 4, "grouped": groups == "own", "seed_key": key}
        clients[client] = catch_up(message, params, state, method, **own)
        assert_trees_identical(clients[client][1], server[number][1])
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), clients[client][0], server[number][0])
        kinds.append(int.from_bytes(message[4:8], "little"))
        down += len(message)
    assert down == result.traffic["bytes_down"]
    # Messages of both kinds were sent.
    assert 0 < kinds.count(2**32 - 2) < len(kinds)


def test_sums_of_another_pool_are_refused():
    updates = fed.Updates(jax.random.key(0), np.arange(9), np.ones((9, 1, 1), np.float32), np.ones(9, bool))
    params = {"w": np.zeros(3, np.float32)}
    method, other = (
        algorithms.load("fed_kseed").build(0.1, {"pool_seeds": seeds, "direction_groups": 1}) for seeds in (2, 3)
    )
    state = method.optimizer.init(params)
    message = catch_up_message(updates, None, 9, (params, state), algorithm=method)
    form = form_of(updates.aggregate)
    for wrong in (other, algorithms.decomfl(0.1)):
        with pytest.raises(ValueError, match="message must be of the run's algorithm"):
            catch_up(message, params, wrong.optimizer.init(params), wrong, form=form)


def test_signs_that_are_flipped_by_blocks_are_of_no_pool():
    method = algorithms.load("fed_kseed").build(0.1, {"direction_groups": 2, "direction_blocks": 4})
    params = {"w": np.zeros(300, np.float32)}
    state = method.optimizer.init(params)
    assert method.pool_of(state) is None
    assert algorithms.fed_kseed(0.1).pool_of(state) is None
    assert algorithms.fed_kseed(0.1).pool_of(algorithms.fed_kseed(0.1).optimizer.init(params)).seeds == 4096


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
