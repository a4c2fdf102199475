"""Fine-tuning a small language model from the command line."""

import json

import pytest

from hiso_jax.cli.main import main
from hiso_jax.tasks.named import TASKS
from hiso_jax.tasks.text import TEXT_TASKS
from tests.cli.test_cli import call
from tests.tasks.text.problems import data_folder, model_folder, write_rows

SMALL = [
    *("--rounds", "4", "--clients", "4", "--cohort", "2", "--perturbations", "2"),
    *("--eval-every", "2", "--batch-size", "8"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_folder(tmp_path_factory.mktemp("data"))


def options(model, data):
    words = ["--template", "{text} It was", "--verbalizer", " bad, good"]
    return ["--task", "text-classification", "--model", model, "--data-dir", data, *words]


@pytest.mark.thorough
def test_a_run_tells_the_accuracy_before_and_after(capsys, tmp_path, model, data):
    out = tmp_path / "run"
    settings = ["--trainable", "lora", "--partition", "dirichlet-balanced", "--param-dtype", "bfloat16"]
    code, text, errors = call(capsys, "run", *options(model, data), *SMALL, *settings, "--out", out)
    assert (code, errors) == (0, "")
    summary = json.loads((out / "summary.json").read_text())
    assert {"loss", "accuracy", "macro_f1"} == set(summary["metrics"])
    assert summary["trained_parameters"] == 2 * 2 * 8 * (32 + 32) - 2 * 8 * 16
    assert f"before {summary['initial_accuracy']:.4f}" in text
    assert "macro f1" in text
    config = json.loads((out / "config.json").read_text())
    assert (config["verbalizer"], config["trainable"], config["target"]) == ([" bad", " good"], "lora", None)
    assert (out / "curves.png").stat().st_size > 1000


def films(tmp_path):
    """Reviews of three films; each row names its film."""
    folder = tmp_path / "films"
    folder.mkdir(exist_ok=True)
    rows = [{"text": f"a {'good' if i % 2 else 'bad'} film", "label": i % 2, "film": "abc"[i % 3]} for i in range(30)]
    write_rows(folder, rows, "train")
    write_rows(folder, [{"text": "a good film", "label": 1}, {"text": "bad", "label": 0}], "validation")
    return folder


@pytest.mark.thorough
def test_a_column_names_the_clients(capsys, tmp_path, model):
    rounds = ["--rounds", "4", "--cohort", "3", "--perturbations", "2", "--eval-every", "2", "--batch-size", "4"]
    words = [*options(model, films(tmp_path)), *rounds, "--trainable", "lora", "--partition", "by-column"]
    out = tmp_path / "run"
    code, _, errors = call(capsys, "run", *words, "--column", "film", "--learning-rate", "0.01", "--out", out)
    assert (code, errors) == (0, "")
    assert json.loads((out / "summary.json").read_text())["participants"] == 3
    assert call(capsys, "replay", out)[0] == 0
    for more, sentence in [
        (["--column", "author"], "--column must be one of the training data; row 1 of train has no author"),
        (
            ["--column", "film", "--cohort", "4"],
            "--cohort must be at most the number of clients, 3, of --partition by-column; got 4",
        ),
        (["--column", "film", "--clients", "3"], "--clients would have no effect with --partition by-column"),
        ([], "--column must be given with partition by-column, and name a column that names the"),
    ]:
        code, _, errors = call(capsys, "run", *words, *more, "--out", tmp_path / "no")
        assert code == 2
        assert sentence in errors
        assert len(errors.strip().splitlines()) == 1


@pytest.mark.thorough
def test_a_comparison_tells_the_worst_tenth_of_the_clients(capsys, tmp_path, model, data):
    out = tmp_path / "comparison"
    words = [*options(model, data), *SMALL, "--algorithms", "decomfl", "--learning-rate", "0.01", "--trainable", "lora"]
    code, text, errors = call(capsys, "compare", *words, "--out", out)
    assert (code, errors) == (0, "")
    run = json.loads((out / "comparison.json").read_text())["methods"]["decomfl"]["runs"][0]
    assert 0 <= run["worst_tenth"] <= 1
    assert "worst tenth" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--task", "sst2"], "--model must name a language model for sst2: by hub name, a folder or a .gguf file"),
        (["--task", "sst2", "--model", "cnn"], "--model must name a language model"),
        (["--task", "text-classification", "--model", "MODEL"], "--template must be given"),
        (["--task", "text-classification", "--model", "x.gguf"], "there is no x.gguf"),
        (["--task", "squad", "--model", "MODEL", "--partition", "dirichlet", "--data-dir", "SQUAD",
          "--max-new-tokens", "4"],
         "--partition must be iid for squad, which has no labels; got dirichlet"),
        (["--task", "qqp", "--model", "MODEL", "--prompts", "mezo"], "--prompts must be decomfl for qqp"),
        (["--task", "sst2", "--trainable", "lora", "--lora-rank", "0"], "--lora-rank must be at least 1, got 0"),
        (["--lora-rank", "4"], "--lora-rank is an option of --trainable lora, and that of --task sst2, qqp, rte"),
        (["--param-dtype", "bfloat16"], "--param-dtype is an option of --task sst2, qqp, rte and 11 more"),
        (["--task", "sst2", "--prefix-tokens", "4"],
         "--prefix-tokens is an option of --trainable prefix; it would have no effect with --trainable lora"),
        (["--task", "sst2", "--max-new-tokens", "4"],
         "--max-new-tokens is an option of --task squad, drop, xsum, chat; it would have no effect with --task sst2"),
        (["--task", "xsum", "--template", "{document}"], "--template is an option of --task sst2, qqp, rte and 7 more"),
        (["--directions", "keep", "--local-steps", "2"], "--directions must be regenerate for several local steps"),
    ],
)  # fmt: skip
def test_bad_usage_is_one_line_and_code_2(capsys, tmp_path, monkeypatch, model, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    row = {"title": "sky", "context": "sky", "question": "what", "answers": {"text": ["blue"]}}
    for split in ("train", "validation"):
        write_rows(tmp_path / "squad", [row] * 4, split)
    named = {"MODEL": str(model), "SQUAD": str(tmp_path / "squad")}
    code, text, errors = call(capsys, "run", *SMALL, *(named.get(word, word) for word in arguments))
    # The command refuses before it loads the model; loading would be reported.
    assert (code, text) == (2, "")
    assert errors.count("\n") == 1
    assert sentence in errors
    assert not (tmp_path / "runs").exists()


def test_the_help_of_a_text_task_has_its_options(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--task", "sst2", "--help-all"])
    text = capsys.readouterr().out
    for option in ("--trainable", "--verbalizer", "--curvature-dtype", "--directions", "text-classification"):
        assert option in text


def test_the_command_line_names_the_tasks_that_there_are():
    images = {"digits", "mnist", "fashion-mnist", "cifar10", "image-classification"}
    assert set(TASKS.factories) == images | {*TEXT_TASKS}
