"""Asynchronous rounds over a network: the first answers count, and every ledger replays."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hiso_jax
from hiso_jax import fed, network
from hiso_jax.fed.population import ABSENT, DROPPED, LATE, REPORTED
from hiso_jax.network.catch_up import HEADER, BadMessage, broadcast_bytes, catch_up
from hiso_jax.network.envelope import Kind, opened
from hiso_jax.network.history import BEGIN, after
from tests.fed.problems import assert_trees_identical, linear_task
from tests.marks import thorough
from tests.network.test_network import CLIENTS, HOSTILE, INVALID, config, make_clients, served

BUFFER = 2
METHODS = {
    "mosaic": lambda: hiso_jax.mosaic(0.3),
    "decomfl": lambda: hiso_jax.decomfl(0.05),
    "local_mosaic": lambda: hiso_jax.local_mosaic(0.3),
}


def parts(method="mosaic", rounds=8, **changes):
    more = {"local_steps": 2} if method == "local_mosaic" else {}
    return network.parts(linear_task(), METHODS[method](), config(rounds, **{"buffer": BUFFER, **more, **changes}))


class Uneven(network.InProcess):
    """Clients 2 and 3 answer every third time that somebody listens, before the others; what they are sent waits."""

    rule = staticmethod(lambda client, answer: answer)

    def __init__(self, clients):
        super().__init__(clients)
        self.calls, self.held = 0, {}

    def exchange(self, outbox, until, waiting=()):
        self.calls += 1
        for client in [client for client in outbox if client >= 2 and opened(outbox[client]).kind is Kind.INVITE]:
            self.held[client] = outbox.pop(client)
        if self.calls % 3 == 0 or not outbox:
            # From a list that outlives this call: who listens may stop before the last.
            while self.held:
                client, message = self.held.popitem()
                yield from self._altered(client, self._clients[client].answer(message))
        for client, answer in super().exchange(outbox, until, waiting):
            yield from self._altered(client, answer)

    def _altered(self, client, answer):
        altered = self.rule(client, answer)
        for each in altered if isinstance(altered, list) else [altered]:
            if each is not None:
                yield client, each


@pytest.mark.parametrize("method", ["mosaic", thorough("decomfl"), thorough("local_mosaic")])
def test_its_ledger_replays_and_the_clients_follow_it(method):
    made = parts(method)
    clients = make_clients(made)
    result, notices = served(made, clients, Uneven)
    records = result.records
    assert (records.attendance == REPORTED).all(), notices
    assert records.valid.all()
    age = records.round[:, None] - records.version
    assert age.max() >= 1
    assert age.min() == 0
    assert result.staleness["most"] == age.max()
    # Every visit counts once.
    visits = list(zip(records.version.ravel().tolist(), records.place.ravel().tolist(), strict=True))
    assert len(set(visits)) == len(visits) == 8 * BUFFER
    replayed, _ = fed.replay(result.initial_params, made.algorithm, records)
    assert_trees_identical(replayed, result.params)
    for client in clients.values():
        stands = client.standing
        at = result.initial_params
        if stands.round:
            at, _ = fed.replay(at, made.algorithm, records.updates.between(0, stands.round))
        assert_trees_identical(stands.params, at)
    assert result.metrics[-1].metrics["loss"] < result.metrics[0].metrics["loss"]


def test_with_the_whole_cohort_in_the_buffer_it_is_a_synchronous_run():
    whole, late = parts("decomfl", 4, buffer=None), parts("decomfl", 4, buffer=CLIENTS)
    one, other = served(whole, make_clients(whole))[0], served(late, make_clients(late))[0]
    np.testing.assert_array_equal(np.sort(one.records.cohort), np.sort(other.records.cohort))
    # The first round begins with the same parameters; answers arrive in any order.
    ours, theirs = (each.records.scalars[0][np.argsort(each.records.cohort[0])] for each in (one, other))
    np.testing.assert_array_equal(ours, theirs)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)


def test_a_client_that_is_silent_is_late_and_its_place_is_free_again():
    class Silent(Uneven):
        rule = staticmethod(
            lambda client, answer: None if client == 1 and opened(answer).kind is Kind.ANSWER else answer
        )

    made = parts(rounds=12)
    result, notices = served(made, make_clients(made), Silent, network=network.NetworkSettings(deadline=0.02))
    records = result.records
    assert (records.attendance[records.cohort == 1] == LATE).sum() >= 1
    assert not (records.attendance[records.cohort == 1] == REPORTED).any()
    assert any("no answer in time of client" in line for line in notices)
    replayed, _ = fed.replay(result.initial_params, made.algorithm, records)
    assert_trees_identical(replayed, result.params)


def test_with_too_few_clients_online_the_rest_of_a_row_is_absent():
    class Alone(Uneven):
        def online(self):
            return {0}

    made = parts(rounds=3)
    result, _ = served(made, make_clients(made), Alone)
    assert (result.records.cohort[:, 0] == 0).all()
    assert (result.records.attendance == [REPORTED, ABSENT]).all()


@pytest.mark.parametrize("name", HOSTILE)
def test_the_ledger_is_right_whatever_a_client_sends(name):
    class Hostile(Uneven):
        rule = staticmethod(
            lambda client, answer: (
                HOSTILE[name](answer, 12345) if client == 0 and opened(answer).kind is Kind.ANSWER else answer
            )
        )

    made = parts(rounds=5)
    result, _ = served(made, make_clients(made), Hostile, network=network.NetworkSettings(deadline=0.5))
    records = result.records
    own = records.attendance[records.cohort == 0]
    wanted = {REPORTED} if name in INVALID else {DROPPED, LATE}
    assert set(own.tolist()) <= wanted
    assert not records.valid[records.cohort == 0].any()
    assert records.valid[(records.cohort != 0) & (records.attendance == REPORTED)].all()
    replayed, _ = fed.replay(result.initial_params, made.algorithm, records)
    assert_trees_identical(replayed, result.params)


def test_answers_that_come_while_clients_evaluate_are_kept():
    """The slow clients' answers come in any exchange, also that of an evaluation; none of them may be lost."""
    given = parts(rounds=8, eval_every=1)
    made = network.parts(given.task, given.algorithm, given.config, held_out=0.2)

    came = []

    class Noting(Uneven):
        def exchange(self, outbox, until, waiting=()):
            evaluates = any(opened(message).kind is Kind.EVALUATE for message in outbox.values())
            for client, message in super().exchange(outbox, until, waiting):
                if evaluates and opened(message).kind is Kind.ANSWER:
                    came.append((client, opened(message).round))
                yield client, message

    result, notices = served(made, make_clients(made), Noting)
    records = result.records
    visits = set(zip(records.cohort.ravel().tolist(), records.version.ravel().tolist(), strict=True))
    # Those of the last evaluation have no round to count in.
    kept = [visit for visit in came if visit[1] < 6]
    assert kept
    assert set(kept) <= visits, notices
    assert np.isfinite([row.metrics["loss"] for row in result.metrics]).all()
    replayed, _ = fed.replay(result.initial_params, made.algorithm, records)
    assert_trees_identical(replayed, result.params)


def test_duplicates_count_once():
    class Twice(Uneven):
        rule = staticmethod(lambda client, answer: [answer, answer])

    made = parts(rounds=6)
    result, _ = served(made, make_clients(made), Twice)
    records = result.records
    visits = list(zip(records.version.ravel().tolist(), records.place.ravel().tolist(), strict=True))
    assert len(set(visits)) == len(visits)


def test_a_server_that_ended_goes_on_from_its_ledger(tmp_path):
    made, clients = parts(rounds=8), make_clients(parts(rounds=8))
    served(parts(rounds=4), clients, Uneven, storage=tmp_path / "run")
    again, _ = served(made, clients, Uneven, storage=fed.Storage(tmp_path / "run", resume=True))
    records = fed.load(tmp_path / "run").records
    assert len(records.round) == 8
    replayed, _ = fed.replay(again.initial_params, made.algorithm, records)
    assert_trees_identical(replayed, again.params)


@pytest.fixture(scope="module")
def rounds_of_mosaic():
    made = parts()
    result, _ = served(made, make_clients(made), Uneven)
    state = made.algorithm.optimizer.init(result.initial_params)
    return made, result, state, made.forms(result.initial_params).down


def test_what_is_broadcast_leads_a_client_to_the_servers_parameters(rounds_of_mosaic):
    made, result, state, form = rounds_of_mosaic
    body = broadcast_bytes(result.records.updates)
    each = [broadcast_bytes(result.records.updates.between(number, number + 1)) for number in range(8)]
    assert body == b"".join(each)
    params, _, _ = catch_up(
        HEADER.pack(0, 8) + body, result.initial_params, state, made.algorithm,
        form=form, clients=BUFFER, seed_key=result.records.seed_key,
    )  # fmt: skip
    assert_trees_identical(params, result.params)
    history = BEGIN
    for own in each:
        history = after(history, own, 1, form)
    assert history == after(BEGIN, body, 8, form)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_broken_broadcasts_are_refused(data, rounds_of_mosaic):
    made, result, state, form = rounds_of_mosaic
    body = broadcast_bytes(result.records.updates)
    cut = data.draw(st.integers(0, len(body) - 1))
    altered = data.draw(st.sampled_from([body[:cut], body + b"\0", b"\xff" * 4 + body[4:], b""]))
    with pytest.raises(BadMessage):
        catch_up(
            HEADER.pack(0, 8) + altered, result.initial_params, state, made.algorithm,
            form=form, clients=BUFFER, seed_key=result.records.seed_key,
        )  # fmt: skip


def test_what_cannot_be_asynchronous_is_refused_over_a_network_too():
    made = network.parts(linear_task(), hiso_jax.hiso(0.1), config(4, buffer=BUFFER))
    with pytest.raises(ValueError, match="depend on past rounds"):
        network.Server(made, network.InProcess({}), clients=CLIENTS)
