"""``hiso-jax compare``: equal budgets, equal numbers of tuning runs, one table, and resumption."""

import json
import shutil

import pytest

from hiso_jax import algorithms, fed
from hiso_jax.cli.arguments import parse
from hiso_jax.tune import Compare
from hiso_jax.tune.directory import LOCKS, own_method
from tests.cli.test_cli import SMALL, call

GIVEN = [*SMALL, "--algorithms", "hiso,decomfl", "--learning-rate", "hiso=0.02,decomfl=0.01:cosine", "--seeds", "1"]
TUNED = ["--rounds", "40", "--clients", "20", "--cohort", "4", "--eval-every", "10", "--perturbations", "2"]
TUNED += [
    "--algorithms",
    "decomfl",
    "--schedules",
    "constant",
    "--tuning-seeds",
    "1",
    "--target",
    "0.15",
    "--seeds",
    "1",
]


# Entries that a user might change in a trial with an editor.
EDITS = [
    {"learning_rate": "fast"},
    {"learning_rate": -1.0},
    {"schedule": "sawtooth"},
    {"final": []},
    {"rounds_to_target": ["never"]},
    {"diverged": None},
]


def read(path):
    return json.loads(path.read_text())


def test_at_given_rates_it_prints_one_table_and_goes_on_where_it_was(capsys, tmp_path):
    out = tmp_path / "comparison"
    code, text, errors = call(capsys, "compare", *GIVEN, "--out", out)
    assert (code, errors) == (0, "")
    compared = read(out / "comparison.json")
    settings = {name: (each["learning_rate"], each["schedule"]) for name, each in compared["methods"].items()}
    assert settings == {"hiso": (0.02, "constant"), "decomfl": (0.01, "cosine")}
    assert compared["methods"]["decomfl"]["runs"][0]["worst_tenth"] is not None
    names = {"config.json", "comparison.json", "metrics.jsonl", "curves.png", "report.html", "runs", LOCKS}
    assert {path.name for path in out.iterdir()} == names
    rows = [line.split()[0] for line in text.splitlines() if line.startswith((" hiso ", " decomfl "))]
    assert rows == ["hiso", "decomfl"]
    # Every method has the same start and the same data.
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    starts = {row["algorithm"]: row["accuracy"] for row in lines if row["round"] == 0}
    assert starts["hiso"] == starts["decomfl"]

    (out / "comparison.json").unlink()
    shutil.rmtree(out / "runs" / "1-decomfl-seed-0")
    # A method that another process runs is left to that process; the comparison reports it once it has ended.
    with own_method(out, 1):
        code, text, errors = call(capsys, "compare", "--resume", out)
    assert (code, errors) == (0, "")
    assert "other processes are at decomfl" in text
    assert [*read(out / "comparison.json")["methods"]] == ["hiso"]
    assert not (out / "runs" / "1-decomfl-seed-0").exists()

    code, text, errors = call(capsys, "compare", "--resume", out)
    assert (code, errors) == (0, "")
    assert "hiso seed 0: all 12 rounds are done" in text
    assert "decomfl seed 0: round 12/12" in text
    after = read(out / "comparison.json")
    for name in ("hiso", "decomfl"):
        before, again = (content["methods"][name]["runs"][0] for content in (compared, after))
        assert before["params_sha256"] == again["params_sha256"]


@pytest.mark.thorough
def test_tuning_is_a_counted_search_that_is_taken_up_run_by_run(capsys, tmp_path, monkeypatch):
    out = tmp_path / "comparison"
    code, text, errors = call(capsys, "compare", *TUNED, "--tries", "4", "--out", out)
    assert (code, errors) == (0, "")
    trials = read(out / "tuning.json")["trials"]
    assert len({trial["learning_rate"] for trial in trials}) == len(trials) == 4
    # The first three rates surround DeComFL's own rate on the digits.
    assert [trial["learning_rate"] for trial in trials[:3]] == [0.01, 0.03, 0.09]
    assert "decomfl: of 4 runs best at rate" in text
    method = read(out / "comparison.json")["methods"]["decomfl"]
    assert [trial["learning_rate"] for trial in method["trials"]] == [trial["learning_rate"] for trial in trials]
    assert None not in [trial["final"][0] for trial in trials[:2]]

    def soonest(trial):
        first = trial["rounds_to_target"][0]
        return 1e9 if first is None else first, -(trial["final"][0] or 0)

    reached = min(trials, key=soonest)
    assert method["learning_rate"] == reached["learning_rate"]

    # The last trial is lost: only this trial is repeated, and the finished run is kept.
    content = read(out / "tuning.json")
    other = {**trials[0], "algorithm": "hiso"}
    (out / "tuning.json").write_text(json.dumps({**content, "trials": trials[:3]}))
    made = []
    sweep = fed.sweep

    def counted(task, make, populations, config, grid, **more):
        made.append(list(grid.learning_rates))
        # Meanwhile another process has recorded a trial of another method.
        (out / "tuning.json").write_text(json.dumps({**content, "trials": [*trials[:3], other]}))
        return sweep(task, make, populations, config, grid, **more)

    monkeypatch.setattr(fed, "sweep", counted)
    code, text, errors = call(capsys, "compare", "--resume", out)
    assert (code, errors) == (0, "")
    assert made == [[trials[3]["learning_rate"]]]
    assert read(out / "tuning.json")["trials"] == [*trials[:3], other, trials[3]]
    assert "decomfl seed 0: all 40 rounds are done" in text
    edited = [
        {**content, "trials": [{"algorithm": "decomfl"}]},
        *({**content, "trials": [{**trials[0], **change}, *trials[1:]]} for change in EDITS),
        {**content, "metric": None},
        [],
    ]
    for each in edited:
        (out / "tuning.json").write_text(json.dumps(each))
        code, _, errors = call(capsys, "compare", "--resume", out)
        assert code == 2, each
        assert "--resume must be a directory whose tuning.json is as it was written" in errors


@pytest.mark.parametrize(
    ("budget", "mosaic", "fed_avg"),
    [("rounds", 60, 60), ("passes", 60 * 6 // 65, 60 * 6 // 3), ("bytes", 60, 60 * 28 // 9648), ("seconds", 5, 115)],
)
def test_every_method_gets_as_much_of_the_budget(capsys, tmp_path, budget, mosaic, fed_avg):
    options = ["--algorithms", "decomfl,mosaic,fed_avg", "--rounds", "60", "--clients", "20", "--cohort", "4"]
    options += ["--eval-every", "20", "--learning-rate", "0.01", "--seeds", "1", "--budget", budget]
    from hiso_jax import tasks
    from hiso_jax.experiment import methods_of
    from hiso_jax.tune.comparison import _lengths

    parsed = parse(Compare, "compare", options)
    lengths = _lengths(parsed, tasks.digits(), methods_of(parsed.algorithms), parsed.clients)
    assert lengths["decomfl"] == (60, 20)
    assert lengths["mosaic"][0] == mosaic
    assert lengths["fed_avg"][0] == pytest.approx(max(1, fed_avg), abs=8 if budget == "seconds" else 0)
    for rounds, every in lengths.values():
        assert rounds // every in (1, 2, 3, 4, 5)


@pytest.mark.thorough
def test_robustness_is_measured_against_the_same_runs_in_calm(capsys, tmp_path):
    out = tmp_path / "comparison"
    options = [*SMALL, "--algorithms", "decomfl", "--learning-rate", "0.02", "--seeds", "2"]
    code, text, errors = call(capsys, "compare", *options, "--protocol", "robustness", "--dropout", "0.5", "--out", out)
    assert (code, errors) == (0, "")
    method = read(out / "comparison.json")["methods"]["decomfl"]
    for run in method["runs"]:
        assert run["attendance"]["dropped"] > 0 == run["in_calm"]["attendance"]["dropped"]
    lost = [run["in_calm"]["accuracy"] - run["accuracy"] for run in method["runs"]]
    assert method["cost_of_trouble"]["mean"] == pytest.approx(sum(lost) / 2)
    assert "trouble" in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--baseline", "mosaic"], "--baseline must be one of the algorithms decomfl, hiso, got mosaic"),
        (["--schedules", "constant,step"], "--schedules must be one of constant, cosine, linear, inverse-sqrt, or"),
        (["--schedules", "linear,linear"], "--schedules must not repeat, got linear,linear"),
        (["--tries", "2"], "--tries must be at least 3, got 2"),
        (["--tuning-seeds", "0"], "--tuning-seeds must be at least 1, got 0"),
        (
            ["--protocol", "robustness"],
            "--protocol robustness needs absent clients: give --availability, --dropout or --deadline",
        ),
        (["--learning-rate", "decomfl=1:step,hiso=1"], "--learning-rate must name one of the schedules constant"),
        (["--schedule", "cosine"], "--schedule is no option of compare; did you mean --schedules?"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(capsys, tmp_path, words, sentence):
    out = tmp_path / "out"
    code, _, errors = call(capsys, "compare", "--algorithms", "decomfl,hiso", *words, "--out", out)
    assert code == 2
    assert sentence in errors
    assert len(errors.strip().splitlines()) == 1
    assert not out.exists()


def test_a_language_model_is_tuned_with_few_runs_by_default():
    options = parse(Compare, "compare", ["--task", "sst2", "--model", "model"])
    assert (options.schedules, options.tries, options.tuning_seeds, options.seeds) == (("constant",), 3, 1, 1)
    digits = parse(Compare, "compare", [])
    assert (len(digits.schedules), digits.tries, digits.tuning_seeds, digits.seeds) == (3, 5, 2, 3)


def test_every_method_goes_with_every_command():
    """No option of a method has the name of a command's option."""
    options = parse(Compare, "compare", ["--algorithms", ",".join(algorithms.NAMES)])
    assert options.algorithms == algorithms.NAMES


@pytest.mark.parametrize("through", [["--attack", "colluding", "--attackers", "0.2"], ["--combine", "median"]])
def test_the_baseline_is_the_same_through_a_channel(through):
    options = parse(Compare, "compare", ["--algorithms", "hiso,decomfl", *through])
    assert options.reference == f"decomfl+{through[1]}"
    both = parse(Compare, "compare", ["--algorithms", "decomfl+median,hiso,decomfl"])
    assert both.reference == "decomfl"
    neither = parse(Compare, "compare", ["--algorithms", "hiso,mosaic"])
    assert neither.reference == "hiso"
