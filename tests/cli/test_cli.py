"""The commands, called as a user calls them."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import hiso_jax
from hiso_jax import availabilities, fed, tasks
from hiso_jax.cli.main import command_of, main

SMALL = ["--rounds", "12", "--clients", "20", "--cohort", "4", "--perturbations", "2", "--eval-every", "4"]


def call(capsys, *arguments):
    """(exit code, stdout, stderr) of the command."""
    # What the test itself printed before, such as a library's advice at its import, is not the command's.
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return ending.value.code, output.out, output.err


def test_run_writes_a_complete_directory(capsys, tmp_path):
    out = tmp_path / "run"
    code, text, errors = call(capsys, "run", *SMALL, "--learning-rate", "0.02", "--out", out)
    assert (code, errors) == (0, "")
    assert "round 12/12" in text
    assert str(out) in text
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "ledger.hiso", "summary.json", "curves.png", ".lock"}

    summary = json.loads((out / "summary.json").read_text())
    expected = {
        "task": "digits",
        "algorithm": "hiso",
        "rounds": 12,
        "forward_passes": 12 * 4 * 3,
        "bytes_paper_convention": 12 * 8 * 2,
        "device_count": 1,
        "process_count": 1,
        "mesh": {"clients": 1, "model": 1},
        "cohort_per_device": 4,
        "cohort_padding": 0,
        "attendance": {"absent": 0, "dropped": 0, "late": 0, "reported": 48, "invalid": 0},
        "target": 0.9,
        "rounds_to_target": None,
        "diverged_at_round": None,
    }
    assert {name: summary[name] for name in expected} == expected
    for name in ("accuracy", "loss", "rounds_per_second", "compile_seconds", "wall_seconds", "jax_version", "device"):
        assert summary[name], name
    for name in ("bytes_up_per_client", "bytes_down_per_client"):
        assert summary[name] > 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 4, 8, 12]
    assert rows[-1]["accuracy"] == summary["accuracy"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_ledger_of_a_run_rebuilds_its_parameters(capsys, tmp_path):
    out = tmp_path / "run"
    call(capsys, "run", *SMALL, "--learning-rate", "0.02", "--momentum", "0.5", "--seed", "5", "--out", out)
    ledger = fed.load(out)
    assert (ledger.header["about"]["seed"], ledger.header["about"]["learning_rate"]) == (5, 0.02)
    import optax

    tx = optax.chain(hiso_jax.scale_by_hiso(), optax.trace(0.5), optax.scale_by_learning_rate(0.02))
    initial = tasks.digits().init(fed.init_key(jax.random.key(5)))
    params, _ = fed.replay(initial, tx, ledger.records)
    assert fed.fingerprint(params) == json.loads((out / "summary.json").read_text())["params_sha256"]


def test_the_default_run_learns_the_digits(capsys, tmp_path):
    """The README's main example: defaults only, with 100 clients, 10 a round, and Dirichlet(0.5)."""
    code, _, _ = call(capsys, "run", "--out", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert code == 0
    assert summary["accuracy"] >= 0.90
    assert summary["rounds_to_target"] is not None


@pytest.mark.thorough
def test_every_option_of_the_optimizer_runs(capsys, tmp_path):
    options = ["--schedule", "cosine", "--weight-decay", "5e-4", "--momentum", "0.9", "--curvature-update", "all"]
    options += ["--sampler", "rademacher", "--difference", "central", "--local-steps", "2", "--partition", "shards"]
    code, _, errors = call(capsys, "run", *SMALL, *options, "--out", tmp_path / "run")
    assert (code, errors) == (0, "")


GRID = ["--rounds", "120", "--clients", "20", "--cohort", "4", "--eval-every", "20", "--perturbations", "2"]
GRID += ["--learning-rate", "0.0001,0.02,1000", "--seeds", "2", "--target", "0.2"]


def test_sweep_tries_the_grid_and_names_the_best(capsys, tmp_path):
    out = tmp_path / "sweep"
    code, text, errors = call(capsys, "sweep", *GRID, "--algorithms", "hiso", "--out", out)
    assert (code, errors) == (0, "")
    assert "hiso: best at rate 0.02, accuracy 0.2 after" in text
    rows = [line.split() for line in text.splitlines() if line.startswith(" hiso ")]
    assert [row[1] for row in rows] == ["0.0001", "0.02", "1000"]
    assert [row[-1] == "best" for row in rows] == [False, True, False]
    assert rows[2][-3:] == ["2", "of", "2"]
    kept = json.loads((out / "sweep.json").read_text())["hiso"]
    assert np.shape(kept["accuracy"]) == (2, 1, 3, 7)
    assert {path.name for path in out.iterdir()} == {"config.json", "sweep.json", "sweep.png"}


@pytest.mark.thorough
def test_who_shows_up_is_told_in_the_summary(capsys, tmp_path):
    options = ["--availability", "diurnal", "--dropout", "0.2", "--deadline", "0.3", "--weighting", "examples"]
    code, text, errors = call(capsys, "run", *SMALL, *options, "--out", tmp_path / "run")
    assert (code, errors) == (0, "")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    attendance = summary["attendance"]
    assert sum(attendance.values()) == 48
    assert min(attendance[name] for name in ("absent", "dropped", "late", "reported")) > 0
    assert f"{attendance['reported']} reports, {attendance['absent']} absent, {attendance['dropped']} dropped" in text
    assert 0 < summary["simulated_seconds"] <= 12 * 0.3 + 1e-3
    assert summary["forward_passes"] == (48 - attendance["absent"]) * 3


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8, 1.0])
def test_the_mean_availability_is_what_was_asked_for(rate):
    """No probability leaves [0, 1]; otherwise clipping would move the mean."""
    wave = availabilities.diurnal(availability_rate=rate)
    assert rate * (1 + wave.amplitude) <= 1 + 1e-9
    assert 0 <= wave.amplitude <= 1
    own = availabilities.per_client(availability_rate=rate, availability_spread=0.5)
    assert (own.low + own.high) / 2 == pytest.approx(rate)


@pytest.mark.thorough
def test_more_clients_than_examples_are_virtual_and_it_says_so(capsys, tmp_path):
    options = ["--clients", "1000000", "--client-examples", "5,20", "--out", tmp_path / "run"]
    code, text, errors = call(capsys, "run", *SMALL[:-2], *options)
    assert (code, errors) == (0, "")
    note = "1,000,000 virtual clients: each draws its own 5 to 20 examples from the pool of 1,437"
    assert note in text


def test_a_rate_of_a_million_diverges_with_code_3(capsys, tmp_path):
    out = tmp_path / "run"
    code, _, errors = call(capsys, "run", *SMALL, "--learning-rate", "1e6", "--out", out)
    summary = json.loads((out / "summary.json").read_text())
    assert code == 3
    assert f"hiso-jax: diverged at round {summary['diverged_at_round']}: " in errors
    assert summary["concerns"][0] in errors
    assert summary["rounds"] == summary["diverged_at_round"] + 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "--cohort", "101"], "--cohort must be at most the number of clients, 100, got 101"),
        (["run", "--perturbations", "0"], "--perturbations must be at least 1, got 0"),
        (["run", "--local-steps", "-1"], "--local-steps must be at least 1, got -1"),
        (["run", "--mu", "0"], "--mu must be a positive finite number, got 0.0"),
        (["run", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["run", "--rounds", "many"], "--rounds must be an integer, got 'many'"),
        (
            ["run", "--task", "digit"],
            "--task must be one of digits, mnist, fashion-mnist, cifar10, image-classification, sst2, qqp",
        ),
        (["run", "--task", "digit"], "or file.py:name; got 'digit'; did you mean digits?\n"),
        (["run", "--task", "imagenet21k"], "text-classification, or file.py:name; got 'imagenet21k'\n"),
        (["run", "--learning-rate", "abc"], "--learning-rate must be a number or auto, got 'abc'"),
        (["run", "--devices", "2000"], "--devices must be at most 128 where they are virtual, got 2000"),
        (["run", "--target", "nan"], "--target must be a finite number, got nan"),
        (["run", "--coordinator", "x:1"], "--coordinator must be given together with --process-id and --num-processes"),
        (["export", "x", "--format", "pt"], "--format must be one of delta, hf, peft, got 'pt'"),
        (["run", "--algorithm", "adam"], "--algorithm must be one of adamezo, bszo, decomfl, fed_adagrad"),
        (["run", "--sampler", "cauchy"], "--sampler must be one of gaussian, rademacher, binomial, uniform, sphere"),
        (["run", "--model", "vit"], "--model must be one of mlp, cnn, got 'vit'"),
        (["run", "--learning-rate", "nan"], "--learning-rate must be a positive finite number, got nan"),
        (["run", "--learning-rate", "inf"], "--learning-rate must be a positive finite number, got inf"),
        (["run", "--learning-rate", "-1"], "--learning-rate must be a positive finite number, got -1.0"),
        (["run", "--clients", "1438", "--partition", "shards"], "--clients must be at most the number of training"),
        (["run", "--virtual", "--partition", "shards"], "--virtual is an option of --partition dirichlet, iid;"),
        (
            ["run", "--client-examples", "9,3"],
            "--client-examples must be two numbers 1 ≤ fewest ≤ most < 2^31, got",
        ),
        (["run", "--client-examples", "1,3000000000"], "--client-examples must be two numbers"),
        (["run", "--client-examples", "9"], "--client-examples must be two numbers"),
        (["run", "--clients", "0"], "--clients must be at least 1, got 0"),
        (["run", "--client-chunk", "0"], "--client-chunk must be at least 1, got 0"),
        (["run", "--memory-budget", "0"], "--memory-budget must be at least 1, got 0"),
        (["run", "--weighting", "size"], "--weighting must be one of uniform, examples, got 'size'"),
        (
            ["run", "--availability", "bernoulli", "--availability-rate", "1.5"],
            "--availability-rate must be between 0 and 1, got 1.5",
        ),
        (["run", "--availability", "trace"], "--trace must be given with availability trace"),
        (["run", "--availability", "trace", "--trace", "no.csv"], "--trace must name a .npy or .csv file of 0s and 1s"),
        (["run", "--dropout", "-1"], "--dropout must be between 0 and 1, got -1.0"),
        (["run", "--deadline", "0"], "--deadline must be a positive finite number, got 0.0"),
        (["run", "--uplink-mbps", "0"], "--uplink-mbps must be a positive finite number, got 0.0"),
        (["run", "--bandwidth-spread", "-1"], "--bandwidth-spread must be a finite number ≥ 0, got -1.0"),
        (["run", "--devices", "0"], "--devices must be at least 1, got 0"),
        (["run", "--devices", "1000"], "--devices must be at most 128 where they are virtual, got 1000"),
        (
            ["run", "--devices", "1", "--model-shards", "2"],
            "--model-shards must divide the number of devices, 1, got 2",
        ),
        (
            ["run", "--coordinator", "localhost:1"],
            "--coordinator must be given together with --process-id and --num-processes",
        ),
        (
            ["run", "--coordinator", "here", "--process-id", "0", "--num-processes", "2"],
            "--coordinator must be an address host:port, got here",
        ),
        (
            ["run", "--coordinator", "localhost:1", "--process-id", "2", "--num-processes", "2"],
            "--process-id must be at least 0 and below --num-processes, 2, got 2",
        ),
        (["sweep", "--learning-rate", "0.1,0.1"], "--learning-rate must not repeat"),
        (["sweep", "--learning-rate", "0.1,-1"], "--learning-rate must be a positive finite number, got -1.0"),
        (["sweep", "--mus", "0"], "--mus must be a positive finite number, got 0.0"),
        (["sweep", "--validation", "1437"], "--validation must be at least 1 and below 1437"),
        (["sweep", "--learning-rates", "0.1"], "did you mean --learning-rate?"),
        (["sweep", "--resume", "nowhere"], "--resume must be the directory of a sweep or a comparison; nowhere has no"),
        (["compare", "--resume", "nowhere", "--rounds", "3"], "--rounds cannot be given with --resume"),
        (["run", "--learning-rate", "fast"], "--learning-rate"),
        (["run", "--probe-rounds", "1"], "--probe-rounds must be at least 2, got 1"),
        (
            ["run", "--probe-rounds", "9", "--learning-rate", "0.1"],
            "--probe-rounds is read by --learning-rate auto; it would have no effect with --learning-rate 0.1",
        ),
        (["run", "--from-snapshot"], "--from-snapshot must be given with --resume"),
        (["run", "--alpha", "0"], "--alpha must be a positive finite number, got 0.0"),
        (["run", "--momentum", "2"], "--momentum must be between 0 and 1, got 2.0"),
        (["run", "--weight-decay", "inf"], "--weight-decay must be a finite number"),
        (["run", "--target", "nan"], "--target must be a finite number"),
        (["run", "--seed", "-1"], "--seed must be at least 0"),
        (["run", "--round", "3"], "--round"),
        (["run", "--mu"], "--mu"),
        (["compare", "--algorithms", "hiso,adam"], "--algorithms must be one of adamezo, bszo, decomfl"),
        (["compare", "--algorithms", "hiso,hiso"], "--algorithms must not repeat"),
        (["compare", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (
            ["compare", "--learning-rate", "hiso=1"],
            "--learning-rate must name each of the algorithms decomfl, hiso, mosaic once",
        ),
        (["compare", "--learning-rate", "1,x"], "--learning-rate must be numbers, comma-separated, got 'x'"),
        (["compare", "--learning-rate", "0.1,nan"], "--learning-rate must be a positive finite number, got nan"),
        (["comapre"], "comapre is no command; the commands are run, sweep,"),
        (["comapre"], "did you mean compare?"),
        (
            ["train"],
            "train is no command; the commands are run, sweep, compare, report, plot, plan, replay",
        ),
    ],
)
def test_bad_usage_is_one_line_and_code_2(capsys, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    jax.devices()  # once JAX has its devices, --devices cannot add any
    code, text, errors = call(capsys, *arguments)
    assert (code, text) == (2, "")
    assert errors.count("\n") == 1
    assert errors.startswith("hiso-jax: error: ")
    assert sentence in errors
    assert list(tmp_path.iterdir()) == []


def test_a_command_needs_no_options():
    """The README's first command has no options."""
    for command in ("run", "sweep", "compare"):
        options, _ = command_of([command])
        assert options.task == "digits"


def test_an_existing_directory_is_not_touched(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    for command in ("run", "sweep", "compare"):
        code, _, errors = call(capsys, command, "--out", tmp_path)
        assert code == 2
        assert errors == f"hiso-jax: error: --out must be a directory that does not exist yet; {tmp_path} does\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_directory_that_cannot_be_made_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, errors = call(capsys, "run", *SMALL, "--out", tmp_path / "file" / "run")
    assert code == 2
    assert errors.startswith("hiso-jax: error: --out cannot be made")


def test_missing_and_truncated_mnist_are_one_line(capsys, tmp_path):
    code, _, errors = call(capsys, "run", "--task", "mnist", "--data-dir", tmp_path, "--out", tmp_path / "run")
    assert code == 2
    assert errors.startswith("hiso-jax: error: --data-dir must hold train-images-idx3-ubyte")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3, 0, 0]))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"")
    code, _, errors = call(capsys, "run", "--task", "mnist", "--data-dir", tmp_path, "--out", tmp_path / "run")
    assert code == 2
    assert "train-images-idx3-ubyte is truncated or damaged" in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_all_help_lists_every_option(capsys):
    for command, option in (("run", "--algorithm"), ("compare", "--algorithms")):
        code, text, _ = call(capsys, command, "--help-all")
        assert code == 0
        for name in (option, "--task", "--clients", "--schedule", "--curvature-decay", "--out"):
            assert name in text


@pytest.mark.parametrize("command", ["run", "sweep", "compare"])
def test_help_is_one_screen_of_options_that_exist(command, capsys):
    code, text, _ = call(capsys, command, "--help")
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) <= 30
    _, everything, _ = call(capsys, command, "--task", "text-classification", "--help-all")
    options = re.findall(r"^  (--[\w-]+)", text, re.M)
    assert len(options) == 15
    for option in options:
        assert re.search(rf"^  {option}\b", everything, re.M)
    # Its examples are commands.
    for words in re.findall(rf"^  hiso-jax {command} (.*?)  ", text, re.M):
        for option in re.findall(r"--[\w-]+", words):
            assert re.search(rf"^  {option}\b", everything, re.M)


def test_an_interrupt_while_jax_is_imported_is_one_line():
    code = """
import builtins, os, signal
real = builtins.__import__
def spy(name, *others, **named):
    if name == "jax":
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *others, **named)
builtins.__import__ = spy
import hiso_jax_command
hiso_jax_command.main()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "hiso-jax: interrupted\n")


def test_a_folder_that_is_another_ones_is_not_gone_on_with(capsys, tmp_path):
    for content, sentence in [
        (None, "--resume must be the directory of a run; .* has no ledger.hiso"),
        ("no JSON", "--resume must be the directory of a run whose config.json is as it was written"),
        ('{"algorithms": ["hiso"], "protocol": "cost-to-target"}', "what .* holds goes on with compare"),
        ('{"algorithms": ["hiso"]}', "what .* holds goes on with sweep"),
    ]:
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        code, _, errors = call(capsys, "run", "--resume", tmp_path)
        assert code == 2
        assert re.search(sentence, errors), errors


@pytest.mark.thorough
def test_what_a_run_that_learned_nothing_is_told(capsys, tmp_path):
    code, text, _ = call(capsys, "run", *SMALL, "--dropout", "1", "--out", tmp_path / "nobody")
    assert code == 0
    assert "nobody reported in any round, so nothing was learned" in text
    assert "rate" not in text.partition("nobody reported")[2]
    noisy = ["--algorithm", "hiso+private_mean", "--noise-multiplier", "300", "--mu", "3e-3", "--seed", "1"]
    code, text, _ = call(capsys, "run", *SMALL, *noisy, "--out", tmp_path / "noisy")
    assert "is probably too high, or the noise too strong\n" in text
    assert "auto" not in text


def test_interrupt_saves_what_was_done(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "hiso_jax.cli.main", "run", "--rounds", "1000000", "--out", str(out)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted after" in text
    summary = json.loads((out / "summary.json").read_text())
    assert summary["interrupted"]
    assert f"hiso-jax run --resume {out}" in text
    records = fed.load(out, unfinished=True).records
    np.testing.assert_array_equal(records.round, np.arange(summary["rounds"]))
    assert summary["rounds"] >= 100


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--mu", "-1e-3"], "--mu must have a value; one that begins with a dash is written --mu=VALUE"),
        (["--mu=-1e-3"], "--mu must be a positive finite number, got -0.001"),
        (["--guard=yes"], "--guard/--no-guard takes no value"),
        (["--rounds", "5", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--learning-rate", "fast"], "--learning-rate must be a number or auto, got 'fast'"),
        (["--client-examples", "3,x"], "--client-examples must be integers, comma-separated, got '3,x'"),
        (["5"], "'5' is no option of run; a list is written with commas, A,B (see --help-all for the options)"),
        (["--scalar-bits", "4", "--bytes-up", "9"], "--scalar-bits must not be given beside --bytes-up"),
    ],
)
def test_a_word_that_cannot_be_read_is_one_sentence(capsys, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    code, text, errors = call(capsys, "run", *words)
    assert (code, text) == (2, "")
    assert errors.startswith(f"hiso-jax: error: {sentence}")
    assert errors.count("\n") == 1


def test_a_target_of_ninety_for_a_share_is_questioned(capsys, tmp_path):
    code, _, errors = call(capsys, "run", "--target", "90", "--out", tmp_path / "run")
    assert code == 2
    assert errors == (
        "hiso-jax: error: --target must be at most 1 for accuracy, a share; got 90; perhaps 0.9 is meant\n"
    )
    assert not (tmp_path / "run").exists()


def test_the_seconds_of_a_summary_add_up_and_the_guard_is_named(capsys, tmp_path):
    numbers = ("--rounds", "4", "--eval-every", "2", "--clients", "8", "--cohort", "4")
    _, text, _ = call(capsys, "run", *numbers, "--out", tmp_path / "run")
    total, each = re.search(r"  seconds +([\d.]+): (.*)", text).groups()
    parts = [float(part) for part in re.findall(r"[\d.]+", each)]
    assert len(parts) == 4
    assert sum(parts) == pytest.approx(float(total), abs=0.21)
    assert re.search(r"  clipped +[\d.]+ % of the messages, by the guard \(--no-guard turns it off\)", text)
    _, text, _ = call(
        capsys, "run", *numbers, "--no-guard", "--algorithm", "decomfl+clip_to_median", "--out", tmp_path / "other"
    )
    assert re.search(r"  clipped +[\d.]+ % of the messages, by clip to median \(half by design\)\n", text)
