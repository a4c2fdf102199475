"""Runs that are interrupted and resumed, and their deltas and exports, from the command line."""

import importlib.util
import json
import os
import re
import shutil

import numpy as np
import pytest

from hiso_jax import fed
from hiso_jax.fed.ledger import LEDGER, frames
from tests.cli.test_cli import call
from tests.tasks.text.problems import data_folder, model_folder

SMALL = ["--rounds", "12", "--clients", "20", "--cohort", "4", "--eval-every", "4", "--perturbations", "2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from rich.console import Console

    from hiso_jax.cli.options import Run
    from hiso_jax.cli.run import run

    out = tmp_path_factory.mktemp("digits") / "run"
    options = Run(rounds=12, clients=20, cohort=4, eval_every=4, perturbations=2, snapshot_every=5, out=out)
    assert run(options, Console(quiet=True)) == 0
    return out


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def cut(directory, frame):
    """Cut a run as a kill does in the middle of the frame of rounds after ``frame``.

    Returns the number of rounds that remain.
    """
    path = directory / LEDGER
    content = path.read_bytes()
    ends = [frame.end for frame in frames.read_frames(content) if frame.kind == b"RNDS"]
    path.write_bytes(content[: ends[frame] + 30])
    for name in ("summary.json", "curves.png"):
        (directory / name).unlink()
    return len(fed.load(path, unfinished=True).rows)


def summary(directory):
    return json.loads((directory / "summary.json").read_text())


@pytest.mark.parametrize("frame", [0, -2])
def test_a_killed_run_goes_on_to_what_it_would_have_been(capsys, finished, copy, frame):
    if frame == 0:
        shutil.rmtree(copy / "snapshots")
    rounds = cut(copy, frame)
    metrics = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join(metrics[:1])[:-20])  # half a line
    code, text, errors = call(capsys, "show", copy)
    assert (code, errors) == (0, "")
    assert f"{rounds} of 12" in text
    assert "of an unfinished frame behind them; not sealed: continue with hiso-jax run --resume" in text
    for command in ("replay", "export"):
        code, _, errors = call(capsys, command, copy)
        assert code == 2
        assert f"--unfinished must be given to take the {rounds} rounds that" in errors
    code, text, _ = call(capsys, "replay", copy, "--unfinished")
    assert code == 0
    assert f"{rounds} of {rounds}" in text
    code, text, errors = call(capsys, "run", "--resume", copy)
    assert code == 0
    assert f"going on after {rounds} rounds" in text
    assert errors.startswith("hiso-jax: ")
    assert f"30 bytes behind its {rounds} rounds, of a frame that was not written to its end" in errors
    whole, again = summary(finished), summary(copy)
    own = {"wall_seconds", "compile_seconds", "rounds_per_second", "seconds_spent"}
    assert {k: v for k, v in whole.items() if k not in own} == {k: v for k, v in again.items() if k not in own}

    def rows(directory):
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    assert rows(copy) == rows(finished)
    assert (copy / "curves.png").stat().st_size > 1000


def test_a_run_that_was_ended_before_its_ledger_begins(capsys, finished, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(finished / "config.json", tmp_path / "run")
    assert call(capsys, "run", "--resume", tmp_path / "run")[0] == 0
    assert summary(tmp_path / "run")["params_sha256"] == summary(finished)["params_sha256"]


def test_replay_says_whether_it_is_the_run(capsys, finished, tmp_path):
    code, text, errors = call(capsys, "replay", finished, "--out", tmp_path / "all.safetensors")
    assert (code, errors) == (0, "")
    assert summary(finished)["params_sha256"] in text
    assert "equal to the run's, bit for bit" in text
    from safetensors.numpy import load_file

    tensors = load_file(tmp_path / "all.safetensors")
    assert sum(array.size for name, array in tensors.items() if name.startswith("params/")) == 2410
    assert any("curvature" in name for name in tensors)
    code, text, _ = call(capsys, "replay", finished, "--to-round", 4)
    assert code == 0
    assert "equal to the run's, bit for bit" in text
    code, text, _ = call(capsys, "replay", finished, "--to-round", 3)
    assert code == 0
    assert "3 of 12" in text
    assert "no SHA-256 was noted after this round" in text
    assert summary(finished)["params_sha256"] not in text


def test_a_delta_is_applied_elsewhere(capsys, finished, tmp_path):
    from safetensors.numpy import load_file

    delta, out = tmp_path / "delta.safetensors", tmp_path / "model.safetensors"
    code, text, errors = call(capsys, "export", finished, "--out", delta)
    assert (code, errors) == (0, "")
    assert "for each 1,000 rounds" in text
    assert str(finished) not in delta.read_bytes().decode("latin-1")
    code, text, errors = call(capsys, "apply", delta, "--out", out)
    assert (code, errors) == (0, "")
    assert f"{summary(finished)['params_sha256']}, the run's" in text
    assert sum(array.size for array in load_file(out).values()) == 2410
    code, text, _ = call(capsys, "show", delta)
    assert code == 0
    assert "every byte verified" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "--resume", "RUN", "--cohort", "3"], "--cohort cannot be given with --resume: the run has its own"),
        (["run", "--resume", "RUN", "--rounds", "3"], "--rounds must be at least the 12 that the run has, got 3"),
        (["show", "RUN", "--salvage", "RUN"], "--salvage must be a directory that does not exist yet"),
        (["replay", "RUN", "--out", "x" * 300], "--out must be a name that a file can have"),
        (["replay", "RUN", "--momentum", "0.5"], "--momentum is no option of replay"),
        (["replay", "RUN", "--to-ruond", "3"], "--to-ruond is no option of replay; did you mean --to-round?"),
        (["run", "--resume", "nowhere"], "--resume must be the directory of a run; nowhere has no ledger.hiso"),
        (["run", "--out", "RUN"], "--out must be a directory that does not exist yet"),
        (["run", "--snapshot-every", "-1"], "--snapshot-every must be at least 0, got -1"),
        (["replay", "RUN", "--to-round", "13"], "--to-round must be between 0 and the 12 rounds of the ledger, got 13"),
        (["replay", "nowhere"], "nowhere cannot be read: No such file or directory"),
        (["export", "RUN", "--format", "hf"], "--format must be delta for digits: transformers has no such model"),
        (["export", "RUN", "--out", "RUN"], "--out must not exist yet"),
        (["apply", "RUN/config.json", "--out", "x"], "its safetensors header is damaged, or it is no delta"),
        (["show", "RUN/config.json"], "is not a ledger that can be read here: it does not begin as a ledger does"),
    ],
)
def test_bad_usage_is_one_line_and_code_2(capsys, tmp_path, monkeypatch, finished, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    code, text, errors = call(capsys, *(word.replace("RUN", str(finished)) for word in arguments))
    assert (code, text) == (2, "")
    assert errors.count("\n") == 1
    assert sentence in errors


def test_an_altered_ledger_is_refused_by_every_command(capsys, copy):
    path = copy / LEDGER
    content = bytearray(path.read_bytes())
    ends = [frame.end for frame in frames.read_frames(bytes(content)) if frame.kind == b"RNDS"]
    content[ends[1] + 60] ^= 4
    path.write_bytes(content)
    for command in (["show", copy], ["replay", copy], ["export", copy], ["run", "--resume", copy]):
        code, _, errors = call(capsys, *command)
        assert code == 2
        assert errors.count("\n") == 1
        assert re.search(r"refused: (round|its frame of rounds) \d+( to \d+)? was altered", errors)


@pytest.mark.thorough
def test_a_full_disk_ends_a_run_that_can_go_on(capsys, monkeypatch, finished, tmp_path):
    original, out = os.pwrite, tmp_path / "run"
    calls = []

    def full(file, data, place):
        calls.append(len(data))
        if len(calls) < 4:
            return original(file, data, place)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frames.os, "pwrite", full)
    code, _, errors = call(capsys, "run", *SMALL, "--snapshot-every", "5", "--out", out)
    assert code == 1
    assert errors.count("\n") == 1
    assert "No space left on device: it cannot be written; what was done before is kept; make room" in errors
    monkeypatch.undo()
    assert call(capsys, "run", "--resume", out)[0] == 0
    assert summary(out)["params_sha256"] == summary(finished)["params_sha256"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The folder of a language model fine-tuned by the command, and of its base."""
    from rich.console import Console

    from hiso_jax.cli.arguments import parse
    from hiso_jax.cli.options import Run
    from hiso_jax.cli.run import run

    folder = tmp_path_factory.mktemp("lm")
    words = ["--task", "text-classification", "--model", str(model_folder(folder / "base"))]
    words += ["--data-dir", str(data_folder(folder / "data")), "--template", "{text} It was", "--verbalizer"]
    words += [" bad, good", "--trainable", "lora", "--learning-rate", "0.02", "--rounds", "6", "--clients", "4"]
    words += ["--cohort", "2", "--perturbations", "2", "--eval-every", "3", "--batch-size", "8"]
    options = parse(Run, "run", [*words, "--out", str(folder / "run")])
    assert run(options, Console(quiet=True)) == 0
    return folder


@pytest.mark.thorough
def test_a_language_model_is_exported_and_applied_alike(capsys, tuned, tmp_path):
    from hiso_jax.models import lm

    code, text, errors = call(capsys, "export", tuned / "run", "--format", "hf", "--out", tmp_path / "exported")
    assert (code, errors) == (0, "")
    assert ", the run's" in text
    delta = tmp_path / "delta.safetensors"
    assert call(capsys, "export", tuned / "run", "--out", delta)[0] == 0
    shutil.copytree(tuned / "base", tmp_path / "elsewhere")
    code, text, errors = call(capsys, "apply", delta, "--base", tmp_path / "elsewhere", "--out", tmp_path / "applied")
    assert (code, errors) == (0, "")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "exported" / name).read_bytes() == (tmp_path / "applied" / name).read_bytes(), name
    base, after = lm.load(tuned / "base"), lm.load(tmp_path / "applied")
    kernels = [model.params["layers"].layers["self_attn"]["q_proj"]["kernel"] for model in (base, after)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4

    # Another checkpoint of the same shapes is not the base.
    from safetensors.numpy import load_file, save_file

    weights = load_file(tmp_path / "elsewhere" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, tmp_path / "elsewhere" / "model.safetensors")
    code, _, errors = call(capsys, "apply", delta, "--base", tmp_path / "elsewhere", "--out", tmp_path / "other")
    assert code == 2
    assert "--base must be the checkpoint that the run began with; the fingerprint of" in errors
    assert not (tmp_path / "other").exists()


@pytest.mark.thorough
def test_adapters_are_exported_for_peft(capsys, tuned, finished, tmp_path):
    from safetensors.numpy import load_file

    code, text, errors = call(capsys, "export", tuned / "run", "--format", "peft", "--out", tmp_path / "adapters")
    assert (code, errors) == (0, "")
    assert ", the run's" in text
    found = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert len(found) == 2 * 2 * 2
    assert max(np.abs(each).max() for name, each in found.items() if "lora_B" in name) > 0
    assert json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["target_modules"] == [
        "q_proj",
        "v_proj",
    ]
    code, _, errors = call(capsys, "export", finished, "--format", "peft", "--out", tmp_path / "other")
    assert (code, errors.count("\n")) == (2, 1)
    assert "--format must be delta for digits" in errors


@pytest.mark.thorough
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_transformers_gives_an_exported_model_the_accuracy_of_the_run(capsys, tuned, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    call(capsys, "export", tuned / "run", "--format", "hf", "--out", tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    words = [tokenizer(word, add_special_tokens=False)["input_ids"][-1] for word in (" bad", " good")]
    rows = [json.loads(line) for line in (tuned / "data" / "validation.jsonl").read_text().splitlines()]
    right = 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(row["text"] + " It was")["input_ids"]])).logits[0, -1]
        right += int(logits[words].argmax()) == row["label"]
    assert right / len(rows) == summary(tuned / "run")["accuracy"]
