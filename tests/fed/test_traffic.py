"""Bytes of messages, compared with counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax
from hiso_jax import algorithms, fed
from hiso_jax.fed.population import ABSENT, DROPPED, LATE, REPORTED, Work
from hiso_jax.fed.run.traffic import NEVER_CAME, Costs, directions_made, download_bytes
from hiso_jax.fed.wire import BroadcastBytes, Wire


def count(traffic, synced_to, number, cohort, attendance=None):
    """Count one round, and update ``synced_to`` [N] as a run does."""
    cohort = np.array(cohort)
    attendance = np.full(len(cohort), REPORTED) if attendance is None else np.array(attendance)
    for skipped in range(len(traffic.broadcast) - 1, number):
        nobody = np.full((1, len(cohort)), ABSENT, np.int8)
        traffic.add(np.array([skipped]), nobody, synced_to[cohort][None], nobody == REPORTED)
    now = attendance[None].astype(np.int8)
    traffic.add(np.array([number]), now, synced_to[cohort][None], now == REPORTED)
    synced_to[cohort[attendance != ABSENT]] = number


def of_scalars(scalars, checkpoint):
    return fed.Traffic(Costs(4 * scalars, BroadcastBytes(4 * scalars), checkpoint, scalars + 1))


def newcomers(clients):
    return np.full(clients, NEVER_CAME, np.int32)


def test_bytes_of_a_small_run():
    traffic, synced_to = of_scalars(6, 10**9), newcomers(5)
    count(traffic, synced_to, 0, [0, 1])
    # Two newcomers have missed no round: each receives a header and the seed.
    assert (traffic.bytes_down, traffic.bytes_up) == (2 * 16, 2 * (8 + 24))
    count(traffic, synced_to, 1, [1, 2])
    # Client 1 missed round 0's aggregate (it sent scalars, but does not know the mean); client 2 is new, and missed it.
    assert traffic.bytes_down == 32 + (8 + 24) + (16 + 24)
    count(traffic, synced_to, 4, [0, 2])
    assert traffic.bytes_down == 104 + (8 + 4 * 24) + (8 + 3 * 24)
    summary = traffic.summary()
    assert summary["bytes_down"] == 288
    assert summary["bytes_up"] == 6 * 32
    assert summary["bytes_down_per_client"] == 288 / 3
    assert summary["bytes_up_per_client"] == 192 / 3
    assert summary["participants"] == 3


def test_who_does_not_report_falls_behind_and_pays_for_it():
    traffic, synced_to = of_scalars(5, 10**9), newcomers(4)
    count(traffic, synced_to, 0, [0, 1, 2, 3], [REPORTED, ABSENT, DROPPED, LATE])
    # An absent client receives nothing; a dropped client has downloaded; a late client has also sent.
    assert (traffic.bytes_down, traffic.bytes_up) == (3 * 16, 2 * 28)
    assert (traffic.participants, traffic.visits) == (3, 3)
    count(traffic, synced_to, 5, [0, 1, 2, 3])
    # Three clients missed rounds 0 to 4; the newcomer missed them, too, and also needs the seed.
    assert traffic.bytes_down == 48 + 3 * (8 + 5 * 20) + (16 + 5 * 20)
    assert traffic.bytes_up == 56 + 4 * 28
    assert (traffic.participants, traffic.visits) == (4, 7)


def test_catch_up_costs_at_most_a_checkpoint():
    traffic = of_scalars(5, 100)
    count(traffic, newcomers(2), 1000, [1])
    assert traffic.bytes_down == 8 + 8 + 100


def test_who_missed_much_of_a_pool_is_sent_its_sums_where_they_are_smaller_than_a_checkpoint():
    broadcast, missed = np.array([200.0, 60.0]), np.array([50, 15])
    for checkpoint, most, made in ((10**6, 4 + 4 * 30, 1 + 30), (100, 100, 1)):
        costs = Costs(4, BroadcastBytes(4), checkpoint, 2, draws=1, pool_seeds=30)
        np.testing.assert_array_equal(download_bytes(broadcast, False, costs), [8 + most, 8 + 60])
        np.testing.assert_array_equal(directions_made(broadcast, missed, costs), [made, 16])


def test_many_missed_rounds_of_many_scalars_do_not_overflow():
    costs = Costs(4 * 10**4, BroadcastBytes(4 * 10**4), 10**12, 0)
    assert download_bytes(np.int64(4 * 10**10), True, costs) == 16 + 4 * 10**10
    on_device = download_bytes(jnp.float32(4e10), True, costs, jnp)
    np.testing.assert_allclose(on_device, 16 + 4 * 10**10, rtol=1e-6)


def test_the_papers_convention_gives_the_papers_figure():
    traffic, synced_to = of_scalars(5, 10**6), newcomers(2)
    for number in range(1500):
        count(traffic, synced_to, number, [number % 2])
    # 58.59 KB (of 1024 bytes) after 1,500 rounds at P = 5 (HiSo, arXiv 2506.02370).
    assert round(traffic.summary()["bytes_paper_convention"] / 1024, 2) == 58.59


def test_a_checkpoint_beyond_an_integer_of_the_device_is_a_number_there():
    """With parameters and curvature above two gigabytes, device and host count the same cost of catching up."""
    costs = Costs(20, BroadcastBytes(20), 27 * 10**9, 6, draws=5)
    broadcast, missed = np.array([40.0, 6e10], np.float32), np.array([2.0, 3e9], np.float32)
    run = jax.jit(
        lambda broadcast, missed: (
            directions_made(broadcast, missed, costs, jnp),
            download_bytes(broadcast, False, costs, jnp),
        )
    )
    here = directions_made(broadcast, missed, costs), download_bytes(broadcast, False, costs)
    for ours, theirs in zip(run(broadcast, missed), here, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert here[0][1] == 5


def test_signs_along_own_directions_are_broadcast_with_a_share_for_every_group():
    """If a client is missing, its group's share is 0 and the others' are larger, which one bit cannot hold."""
    aggregate = jax.ShapeDtypeStruct((1, 10 * 5), jnp.float32)
    signs = Wire(up_bits=1, down_bits=1)
    assert signs.down(aggregate, 10) == BroadcastBytes(7 + 4 * 10)
    assert signs.down(aggregate) == BroadcastBytes(7)
    assert Wire().down(aggregate, 10) == BroadcastBytes(200)


@pytest.mark.thorough
@pytest.mark.parametrize("missing", [False, True])
def test_what_signs_along_own_directions_lead_to_is_what_was_broadcast(missing):
    algorithm = algorithms.load("sign").build(0.1, {"direction_groups": "own", "guard": False})
    round_of = hiso_jax.make_round(
        lambda x, t: ((x - t) ** 2).sum(-1), algorithm, local_steps=1, num_perturbations=3, mu=1e-3
    )
    targets = jnp.asarray(np.random.default_rng(0).normal(size=(4, 1, 2, 8)), jnp.float32)
    mask = jnp.array([True, True, not missing, True])
    x = jnp.zeros(8)
    record = round_of(x, algorithm.optimizer.init(x), targets, mask, jax.random.key(0))[2]
    groups = np.asarray(record.aggregate).reshape(4, 3)
    shares = 4 * np.asarray(mask) / np.asarray(mask).sum()
    # Every number takes one bit, and every group one float.
    np.testing.assert_allclose(np.abs(groups), np.broadcast_to(shares[:, None], (4, 3)), rtol=1e-6)


def test_a_message_of_more_bytes_than_an_integer_of_the_device_has_a_time():
    quick = fed.LogNormal(1e-3, 0.0)
    fleet = fed.Fleet(quick, fed.LogNormal(1e6, 0.0), fed.LogNormal(1e6, 0.0))
    work = Work(jnp.zeros(2), 3e9, 5, jnp.zeros(2))
    seconds = jax.jit(lambda: fleet.seconds(jax.random.key(0), jnp.arange(2), work))()
    np.testing.assert_allclose(seconds, 3000, rtol=1e-3)
