"""Bytes, counted by hand."""

import numpy as np

from hiso_jax import fed


def test_bytes_of_a_small_run():
    traffic = fed.Traffic(clients=5, scalars=6, checkpoint_bytes=10**9)
    traffic.add_round(0, np.array([0, 1]))
    # Two newcomers who have missed nothing: header and seed each.
    assert (traffic.bytes_down, traffic.bytes_up) == (2 * 16, 2 * (8 + 24))
    traffic.add_round(1, np.array([1, 2]))
    # Client 1 missed round 0's aggregate (it sent scalars, but the mean is news); client 2 is new and missed it too.
    assert traffic.bytes_down == 32 + (8 + 24) + (16 + 24)
    traffic.add_round(4, np.array([0, 2]))
    assert traffic.bytes_down == 104 + (8 + 4 * 24) + (8 + 3 * 24)
    summary = traffic.summary()
    assert summary["bytes_down"] == 288
    assert summary["bytes_up"] == 6 * 32
    assert summary["bytes_down_per_client"] == 288 / 3
    assert summary["bytes_up_per_client"] == 192 / 3


def test_catch_up_costs_at_most_a_checkpoint():
    traffic = fed.Traffic(clients=2, scalars=5, checkpoint_bytes=100)
    traffic.add_round(1000, np.array([1]))
    assert traffic.bytes_down == 8 + 8 + 100


def test_the_papers_convention_gives_the_papers_figure():
    traffic = fed.Traffic(clients=2, scalars=5, checkpoint_bytes=10**6)
    for number in range(1500):
        traffic.add_round(number, np.array([number % 2]))
    # 58.59 KB (of 1024 bytes) after 1,500 rounds at P = 5 (HiSo, arXiv 2506.02370).
    assert round(traffic.summary()["bytes_paper_convention"] / 1024, 2) == 58.59
