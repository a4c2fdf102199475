"""Ratios of paired runs: intervals, runs that never reach the target, and the table that shows them."""

import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from hiso_jax import fed
from hiso_jax.reports import (
    Compared,
    as_results,
    check_figures,
    comparison_table,
    human_bytes,
    human_count,
    interval,
    paired_ratio,
)


def ran(seed, rounds, accuracy=0.9, diverged=None, planned=1000):
    """A run as its summary reports it, with 20 bytes, 6 loss evaluations and half a second a round."""
    unit = {"rounds": 1, "bytes_up": 20, "bytes": 30, "forward_passes": 6, "simulated_seconds": 0.5}
    reached = {f"{name}_to_target": None if rounds is None else each * rounds for name, each in unit.items()}
    totals = {
        "rounds": 500,
        "bytes_up": 10_000,
        "bytes_down": 5_000,
        "forward_passes": 3000,
        "simulated_seconds": 250.0,
    }
    own = {"seed": seed, "metric": "accuracy", "accuracy": accuracy, "diverged_at_round": diverged, "worst_tenth": 0.5}
    return {**own, **reached, **totals, "rounds_planned": planned}


def test_an_interval_is_students_on_logarithms_from_five_pairs_on():
    base, own = [100, 200, 150, 120, 300], [50, 120, 60, 70, 120]
    runs = [[ran(seed, rounds) for seed, rounds in enumerate(each)] for each in (own, base)]
    ratio = paired_ratio(*runs)
    logs = np.log(np.array(own) / np.array(base))
    expected = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    np.testing.assert_allclose([ratio.value, ratio.low, ratio.high], np.exp([logs.mean(), *expected]), rtol=1e-12)
    assert (ratio.pairs, ratio.bound) == (5, None)
    assert paired_ratio(*runs, "bytes_up") == ratio
    few = paired_ratio(runs[0][:4], runs[1][:4])
    assert (few.low, few.high) == (None, None)


@given(st.permutations(range(6)))
def test_pairs_are_found_by_their_seeds(order):
    base = [ran(seed, 100 + seed) for seed in range(6)]
    own = [ran(seed, 50 + seed) for seed in order]
    assert paired_ratio(own, base) == paired_ratio(sorted(own, key=lambda run: run["seed"]), base)


def test_a_run_that_never_got_there_took_at_least_all_that_was_planned():
    base = [ran(0, 100), ran(1, 100)]
    ratio = paired_ratio([ran(0, 100), ran(1, None)], base)
    assert (ratio.bound, ratio.pairs, ratio.low) == ("least", 2, None)
    assert ratio.value == pytest.approx(math.sqrt(1 * 10))
    most = paired_ratio(base, [ran(0, 100), ran(1, None)], "forward_passes")
    assert (most.bound, most.value) == ("most", pytest.approx(math.sqrt(1 * 600 / 6000)))
    assert paired_ratio([ran(0, None)], [ran(0, None)]) is None
    assert paired_ratio([ran(0, None), ran(1, 5)], [ran(0, 5), ran(1, None)]) is None


def test_a_run_that_began_at_the_target_took_less_than_a_round():
    there = paired_ratio([ran(0, 0), ran(1, 100)], [ran(0, 100), ran(1, 100)])
    # The run is counted with one round of 20 bytes, and compared with 100 rounds.
    assert (there.bound, there.pairs) == ("most", 2)
    assert there.value == pytest.approx(math.sqrt(1 / 100 * 1))
    assert paired_ratio([ran(0, 100)], [ran(0, 0)], "bytes_up").bound == "least"
    assert paired_ratio([ran(0, 100)], [ran(0, 0)], "bytes_up").value == pytest.approx(100)
    # The ratio of zero rounds to zero rounds is not defined.
    assert paired_ratio([ran(0, 0)], [ran(0, 0)]) is None
    # One run took less and one never reached the target: their mean ratio has no bound.
    assert paired_ratio([ran(0, 0), ran(1, None)], [ran(0, 100), ran(1, 100)]) is None
    both = paired_ratio([ran(0, None)], [ran(0, 0)])
    assert (both.bound, both.value) == ("least", pytest.approx(1000))


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (999, "999 B"), (999.7, "1 kB"), (999_499, "999 kB"), (999_500, "1 MB"), (999_999, "1 MB"), (1e15, "1 PB"),
        (1e22, "10000 EB"),        (58_590, "58.6 kB"), (0, "0 B"),
    ],
)  # fmt: skip
def test_a_unit_is_chosen_for_the_number_that_is_shown(count, shown):
    assert human_bytes(count) == shown


def test_counts_too():
    assert (human_count(999_999_999), human_count(1_499), human_count(12)) == ("1G", "1.5k", "12")


@pytest.mark.parametrize("centre", [0.0, -1.0])
def test_the_interval_covers_what_it_should(centre):
    """95 of a hundred intervals hold the truth, here within five standard errors for 400 samples of five."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        _, low, high = interval(rng.normal(centre, 0.3, 5).tolist())
        held += low <= centre <= high
    assert abs(held / 400 - 0.95) < 5 * math.sqrt(0.95 * 0.05 / 400)


def test_the_table_does_not_flatter_a_method_that_misses_the_target():
    def compared(*runs):
        tuned = {"learning_rate": 0.0123456, "schedule": "inverse-sqrt", "trials": [], "at_edge": False}
        return Compared(tuned, list(runs), [[] for _ in runs])

    methods = {
        "always": compared(ran(0, 100, 0.9), ran(1, 300, 0.8)),
        "sometimes": compared(ran(0, 100, 0.9), ran(1, None, 0.5)),
        "never": compared(ran(0, None, 0.1, diverged=7), ran(1, None, 0.3)),
    }
    results = as_results(methods, "always")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison_table(methods, results, fed.Metric("accuracy"), 0.85, "always"))
    lines = [line for line in console.export_text().splitlines() if line.strip()]
    place = {name: next(i for i, line in enumerate(lines) if line.split()[0] == name) for name in methods}
    first, second = lines[place["always"] : place["always"] + 2]
    assert first.split() == ["always", "0.0123", "200", "1", "4", "kB", "1.2k", "0.850", "±", "0.071"]
    assert second.split() == ["1/√", "±", "141", "6", "kB", "1:40", "0.500"]
    assert "≥ 1.83" in lines[place["sometimes"]]
    assert "1 of 2" in lines[place["sometimes"] + 1]
    assert "diverged 1 of 2" in lines[place["never"]]
    assert "≥ 5.77" in lines[place["never"]]
    assert max(map(len, lines)) <= 80
    assert (results["never"]["reached"], results["never"]["diverged"]) == (0, 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": None}, "seed"),
        ({"rounds_to_target": "soon"}, "rounds_to_target"),
        ({"metric": 3}, "metric"),
        ({"bytes_up": [1]}, "bytes_up"),
        ({"rounds": True}, "rounds"),
    ],
)
def test_figures_that_somebody_edited_are_named(changes, said):
    check_figures(ran(0, 100))
    with pytest.raises(ValueError, match=said):
        check_figures({**ran(0, 100), **changes})
