"""One kill of a run of digits; ``python -m tests.survival`` makes more kills, of language models too."""

import pytest

from tests.survival import Case, leave_alone, survive

OPTIONS = [
    "--rounds",
    "1500",
    "--eval-every",
    "100",
    "--snapshot-every",
    "400",
    "--clients",
    "20",
    "--cohort",
    "4",
    "--perturbations",
    "2",
]


@pytest.mark.thorough
def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path):
    case = Case("digits", OPTIONS)
    leave_alone(case, tmp_path / "alone")
    killed, exported = survive(case, tmp_path, 1, seed=3)
    assert killed["rounds"] > 0
    assert exported["sealed"]
