"""Attacks, combiners, privacy and diagnosis from the command line."""

import json

import pytest

from tests.cli.test_cli import call

SMALL = ["--rounds", "8", "--clients", "20", "--cohort", "6", "--eval-every", "4", "--batch-size", "8"]


def summary(directory):
    return json.loads((directory / "summary.json").read_text())


@pytest.mark.thorough
def test_a_run_tells_who_was_attacked_by_whom_and_what_was_clipped(capsys, tmp_path):
    words = [
        "--combine",
        "clip_to_median+median",
        "--attack",
        "sign_flip",
        "--attack-scale",
        "100",
        "--attackers",
        "0.3",
    ]
    code, text, errors = call(capsys, "run", *SMALL, *words, "--out", tmp_path / "run")
    assert (code, errors) == (0, "")
    assert "attacked by     6 of 20 clients: sign_flip" in text
    assert "clipped         " in text
    found = summary(tmp_path / "run")
    assert found["algorithm"] == "hiso+clip_to_median+median+sign_flip"
    assert 0.3 < found["clipped"] < 1
    # The name holds every part, so the run is replayed and resumed like any other.
    assert call(capsys, "replay", tmp_path / "run")[0] == 0
    code, text, _ = call(capsys, "run", "--resume", tmp_path / "run", "--rounds", "12")
    assert code == 0
    assert "going on after 8 rounds" in text


@pytest.mark.thorough
def test_a_private_run_finds_its_noise_and_says_what_was_spent(capsys, tmp_path, monkeypatch):
    words = ["--combine", "private_mean", "--epsilon", "8", "--clip-norm", "0.5"]
    code, text, errors = call(capsys, "run", *SMALL, *words, "--out", tmp_path / "run")
    assert (code, errors) == (0, "")
    spent = summary(tmp_path / "run")["privacy"]
    assert 7.9 < spent["epsilon"] <= 8
    assert spent["visits"] is None
    assert "ε 8 at δ 1e-05 for a client: secret cohorts, the server's noise" in text
    code, _, errors = call(capsys, "run", "--resume", tmp_path / "run", "--rounds", "12")
    assert code == 2
    assert "--rounds must be the run's, 8: its noise was found for them" in errors
    # The ledger has the noised aggregates, so the model is rebuilt without the accountant.
    assert call(capsys, "export", tmp_path / "run", "--out", tmp_path / "delta.safetensors")[0] == 0
    with monkeypatch.context() as without:
        without.setattr("hiso_jax.experiment.budget.is_installed", lambda: False)
        assert call(capsys, "replay", tmp_path / "run")[0] == 0
        applied = ["apply", tmp_path / "delta.safetensors", "--out", tmp_path / "model.safetensors"]
        assert call(capsys, *applied)[0] == 0
    words = ["--algorithm", "decomfl+local_noise", "--noise-multiplier", "40"]
    code, text, _ = call(capsys, "run", *SMALL, *words, "--out", tmp_path / "local")
    assert code == 0
    assert "visits of one client, each client's own noise 40 × 1" in text


@pytest.mark.thorough
def test_all_methods_of_a_comparison_are_attacked_alike(capsys, tmp_path):
    words = ["--algorithms", "decomfl,fed_avg", "--learning-rate", "decomfl=0.03,fed_avg=0.1"]
    words += ["--attack", "scaled", "--attackers", "0.34", "--attackers-of", "cohort", "--combine", "median"]
    code, _text, errors = call(capsys, "compare", *SMALL, *words, "--out", tmp_path / "comparison")
    assert (code, errors) == (0, "")
    methods = json.loads((tmp_path / "comparison" / "comparison.json").read_text())["methods"]
    assert list(methods) == ["decomfl+median+scaled", "fed_avg+median+scaled"]
    one = next((tmp_path / "comparison" / "runs").glob("*decomfl*"))
    assert summary(one)["attacked_by"] == "2 of every cohort of 6: scaled"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--combine", "nothing"], "--combine must be one of clip, clip_to_median, geometric_median, krum"),
        (["--combine", "sign_flip"], "--combine must be one of clip"),
        (["--attack", "median"], "--attack must be one of colluding, gaussian_attack"),
        (["--attack", "sign_flip"], "--attackers must be given with --attack, a share of the clients above 0"),
        (["--attackers", "0.2"], "--attackers must be given with --attack"),
        (["--attack", "sign_flip", "--attackers", "1.5"], "--attackers must be at least 0 and below 1"),
        (["--attackers-of", "cohort"], "--attackers-of is read with --attack"),
        (["--attack-scale", "3"], "--attack-scale is an option of the channels gaussian_attack, inner_product, scaled"),
        (["--combine", "median+krum"], "must go through one combiner at most"),
        (["--combine", "median", "--weighting", "examples"], "--weighting must be uniform"),
        (["--algorithm", "mosaic", "--combine", "krum"], "--direction-groups must leave 3 clients along the same"),
        (["--epsilon", "3"], "--epsilon is read with --combine private_mean"),
        (["--public-cohorts"], "--public-cohorts is read with --combine private_mean"),
        (["--combine", "private_mean", "--epsilon", "-1"], "--epsilon must be a positive finite number"),
        (["--combine", "private_mean", "--epsilon", "1e9"], "--epsilon must be below 10000"),
        (
            ["--combine", "private_mean", "--epsilon", "3", "--noise-multiplier", "1"],
            "--epsilon must not be given beside",
        ),
        (["--combine", "private_mean", "--learning-rate", "auto"], "--learning-rate must be a number in a private run"),
        (["--algorithm", "mosaic+private_mean", "--relay", "messages"], "--relay must be aggregate for a private mean"),
    ],
)
def test_what_would_have_no_effect_or_tell_more_is_refused(capsys, tmp_path, words, sentence):
    code, text, errors = call(capsys, "run", *SMALL, *words, "--out", tmp_path / "run")
    assert code == 2
    assert text == ""
    assert errors.startswith(f"hiso-jax: error: {sentence}") or sentence in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


CHEAP = ["--examples", "64", "--lanczos-steps", "4", "--clients", "3", "--batches", "2", "--directions", "2"]


@pytest.mark.thorough
def test_a_diagnosis_is_told_and_written(capsys, tmp_path):
    assert call(capsys, "run", *SMALL, "--out", tmp_path / "run")[0] == 0
    words = ["--at", "0,8", "--exact-up-to", "0", "--samples", "2", *CHEAP]
    code, text, errors = call(capsys, "diagnose", tmp_path / "run", *words)
    assert (code, errors) == (0, "")
    assert "whitening rank ζ" in text
    assert "after 8 rounds" in text
    assert "bottleneck" in text
    rounds = json.loads((tmp_path / "run" / "diagnosis.json").read_text())["rounds"]
    assert [each["round"] for each in rounds] == [0, 8]
    # At the beginning H is 1 everywhere, so it has no correlation with the Hessian.
    assert rounds[0]["hessian"] is None
    assert -1 < rounds[1]["hessian"] < 1
    assert rounds[0]["whitening_rank"] == pytest.approx(rounds[0]["trace"], rel=1e-4)
    assert (tmp_path / "run" / "diagnosis.png").stat().st_size > 1000


@pytest.mark.thorough
def test_a_diagnosis_of_what_is_not_there_is_refused(capsys, tmp_path):
    assert call(capsys, "run", *SMALL, "--algorithm", "decomfl", "--out", tmp_path / "run")[0] == 0
    code, _, errors = call(capsys, "diagnose", tmp_path / "run", "--at", "9")
    assert (code, "--at must be between 0 and the 8 rounds of the ledger, got 9" in errors) == (2, True)
    code, _, errors = call(capsys, "diagnose", tmp_path / "run", "--samples", "1")
    assert (code, "--samples must be" in errors) == (2, True)
    code, _, errors = call(capsys, "diagnose", tmp_path / "nothing")
    assert code == 2
    # Without a curvature the other figures are still reported.
    code, text, _ = call(
        capsys, "diagnose", tmp_path / "run", "--at", "8", "--exact-up-to", "0", "--samples", "2", *CHEAP
    )
    assert code == 0
    assert "H and the Hessian" not in text


@pytest.mark.thorough
def test_the_noise_of_a_sweep_meets_the_budget_with_every_seed():
    """Without secret cohorts a seed sets how often a client comes; the most frequent client sets the noise of all."""
    from hiso_jax import algorithms
    from hiso_jax.experiment import build_algorithm
    from hiso_jax.experiment.budget import noise_for_budget
    from hiso_jax.tune import Sweep

    options = Sweep(algorithms=("decomfl+local_noise",), epsilon=8.0, rounds=30, clients=20, cohort=5)
    alone = [noise_for_budget(options, False, [seed]) for seed in range(4)]
    assert len(set(alone)) > 1
    assert noise_for_budget(options, False, range(4)) == max(alone)
    method = algorithms.load("decomfl+local_noise")
    assert build_algorithm(options, method, 0.1, seeds=range(4)).noise == (1.0, max(alone))
    assert noise_for_budget(options, False, [0], sensitivity=3) == pytest.approx(3 * alone[0])
