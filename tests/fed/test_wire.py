"""Catching up: what absent clients are sent, to the byte, rebuilds the server, to the bit."""

import jax
import numpy as np
import pytest

import hiso_jax
from hiso_jax import fed
from hiso_jax.fed.ledger import catch_up, catch_up_message
from hiso_jax.fed.population import ABSENT
from hiso_jax.fed.run.traffic import Costs, download_bytes, stood_at
from tests.fed.problems import assert_trees_identical, digits_population, linear_task, optimizers

ROUNDS = 24


def played(tx, rounds=ROUNDS, **settings):
    config = fed.SimulationConfig(
        rounds=rounds, cohort=4, batch_size=8, eval_every=rounds, perturbations=2, local_learning_rate=0.01, **settings
    )
    rules = fed.Participation(availability=fed.Bernoulli(0.3))
    return fed.Simulation(linear_task(), tx, digits_population(), config, participation=rules).run()


@pytest.mark.parametrize("name", ["hiso-all", pytest.param("momentum", marks=pytest.mark.slow)])
def test_clients_that_join_at_random_rounds_catch_up_to_the_last_bit(name):
    """Every visit of the run: the client replays what it missed from the bytes it is sent, and is where the server is.

    Rounds in which nobody came are among what they miss: nothing was applied then.
    """
    tx = optimizers()[name]
    result = played(tx, local_steps=2)
    updates, records = result.records.updates, result.records
    assert not updates.applied.all()
    server = {0: (result.initial_params, tx.init(result.initial_params))}
    for number in range(ROUNDS):
        # One round after the other, as the server made them.
        params, state = server[number]
        server[number + 1] = fed.replay(params, tx, updates.between(number, number + 1), state=state)
    assert_trees_identical(server[ROUNDS], (result.params, result.state))

    stood, _ = stood_at(records.round, records.cohort, records.attendance, 12)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(server[0]))
    clients, total = {}, 0
    for number in range(ROUNDS):
        for client, synced, status in zip(
            records.cohort[number], stood[number], records.attendance[number], strict=True
        ):
            if status == ABSENT:
                continue
            before = clients.get(int(client))
            assert (before is None) == (synced == -1)
            message = catch_up_message(updates, None if before is None else int(synced), number, server[number])
            assert len(message) == download_bytes(number, np.int32(synced), Costs(16, 16, size, 0))
            total += len(message)
            params, state, key = before or (*server[0], None)
            clients[int(client)] = catch_up(message, params, state, tx, shape=(2, 2), seed_key=key)
            assert_trees_identical(clients[int(client)][:2], server[number])
    assert total == result.traffic["bytes_down"]
    assert len(clients) == result.traffic["participants"]


def test_who_missed_more_than_a_checkpoint_is_sent_one():
    tx = hiso_jax.decomfl(0.02)
    params = {"w": np.arange(3, dtype=np.float32)}
    updates = fed.Updates(
        jax.random.key(7), np.arange(50, dtype=np.int32), np.ones((50, 1, 1), np.float32), np.ones(50, bool)
    )
    server = fed.replay(params, tx, updates)
    message = catch_up_message(updates, 3, 50, server)
    assert len(message) == 8 + sum(leaf.nbytes for leaf in jax.tree.leaves(server))
    caught = catch_up(message, params, tx.init(params), tx, shape=(1, 1), seed_key=jax.random.key(7))
    assert_trees_identical(caught[:2], server)


def test_a_message_of_other_numbers_than_it_can_hold_is_refused():
    updates = fed.Updates(jax.random.key(0), np.arange(1), np.ones((1, 1, 1), np.float64), np.ones(1, bool))
    with pytest.raises(ValueError, match="got float64"):
        catch_up_message(updates, None, 1, ({}, {}))
