"""Reports as HTML files and figures for papers: what they show is what was run, and a browser draws every chart."""

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

import hiso_jax
from hiso_jax import fed, reports, tune
from hiso_jax.reports import charts
from hiso_jax.reports.page import verdict_of
from hiso_jax.reports.paired import FIGURES
from hiso_jax.reports.subject import line_of, read_subject
from tests.cli.test_cli import call

NUMBERS = {"clients": 20, "cohort": 4, "perturbations": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """A comparison with the files it wrote, and a run."""
    folder = tmp_path_factory.mktemp("reports")
    asked = {"rounds": 8, "eval_every": 2, "seeds": 2, "target": 0.12, "learning_rate": ["0.02"]}
    compared = tune.compare(["decomfl", "hiso"], out=folder / "compared", **asked, **NUMBERS)
    experiment = hiso_jax.Experiment(algorithm="mosaic", rounds=4, eval_every=1, clients=20, cohort=4, batch_size=8)
    result = experiment.run(folder / "run")
    return folder, compared, result


class Page(HTMLParser):
    """The charts, the text and the addresses of a page; it must be well formed."""

    def __init__(self, text):
        super().__init__()
        self.specs, self.words, self.addresses, self.stack, self._script = {}, [], [], [], None
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.addresses += [values[name] for name in ("src", "href") if name in values]
        if tag == "script":
            self._script = values.get("id", "")
        if tag not in ("meta", "link", "br", "img"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag
        self._script = None if tag == "script" else self._script

    def handle_data(self, text):
        if self._script:
            self.specs[self._script] = json.loads(text)
        elif self._script is None and self.stack[-1:] != ["style"]:
            self.words.append(text)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def test_a_report_shows_what_was_run(studies, tmp_path):
    folder, compared, result = studies
    page = Page(tune.report(folder / "compared", folder / "run", out=tmp_path / "report.html").read_text())
    assert page.addresses == ["data:,"]
    titles = [spec["title"]["text"] for spec in page.specs.values()]
    assert titles.count("test accuracy against rounds") == 2
    assert "accuracy of the clients" in titles
    assert "cost to accuracy 0.12" in titles
    for digest in [row["params_sha256"] for row in compared.rows()] + [fed.fingerprint(result.params)]:
        assert digest in page.text
    command = "hiso-jax run --algorithm mosaic --rounds 4 --cohort 4 --batch-size 8 --eval-every 1"
    assert command in page.text
    assert "2 seeds: ratios have no intervals, which need 5" in page.text
    first = next(spec for spec in page.specs.values() if spec["title"]["text"] == "test accuracy against rounds")
    rows = [row for row in first["data"]["values"] if row["method"] == "hiso"]
    each = [[row.metrics["accuracy"] for row in history] for history in compared.compared["hiso"].histories]
    np.testing.assert_allclose([row["mean"] for row in rows], np.mean(each, 0), rtol=1e-5)
    np.testing.assert_allclose([row["low"] for row in rows], np.min(each, 0), rtol=1e-5)
    assert [row["at"] for row in rows] == [0, 2, 4, 6, 8]


def test_a_comparison_writes_its_report_and_a_notebook_shows_it(studies):
    folder, compared, _ = studies
    written = (folder / "compared" / "report.html").read_text()
    assert written == reports.as_page([compared.subject()])
    shown = compared._repr_html_()
    Page(shown)
    assert "decomfl" in shown
    assert "<script" not in shown


def test_a_notebook_shows_a_result(studies):
    result = studies[2]
    shown = result._repr_html_()
    Page(shown)
    assert f"Test accuracy {result.metrics[-1].metrics['accuracy']:.4g} after 4 rounds." in shown
    assert "data:image/png;base64," in shown
    assert dataclasses.replace(result, metrics=[])._repr_html_() is None
    assert reports.figure is tune.figure


def test_the_command_of_a_report_makes_the_same_again(studies, capsys, tmp_path):
    folder, compared, _ = studies
    words = compared.subject().command.split()
    assert words[:2] == ["hiso-jax", "compare"]
    assert call(capsys, *words[1:], "--out", tmp_path / "again")[0] == 0
    again = json.loads((tmp_path / "again" / "comparison.json").read_text())["methods"]
    first = json.loads((folder / "compared" / "comparison.json").read_text())["methods"]
    for name in first:
        digests = [[run["params_sha256"] for run in each[name]["runs"]] for each in (first, again)]
        assert digests[0] == digests[1]


@pytest.mark.thorough
def test_the_command_of_a_resumed_run_has_the_rounds_that_it_has_now(capsys, tmp_path):
    words = ("--cohort", 2, "--batch-size", 4, "--eval-every", 2)
    assert call(capsys, "run", *words, "--rounds", 2, "--out", tmp_path / "run")[0] == 0
    assert call(capsys, "run", "--resume", tmp_path / "run", "--rounds", 4)[0] == 0
    command = tune.reporting.subject_of(tmp_path / "run").command.split()
    assert call(capsys, *command[1:], "--out", tmp_path / "again")[0] == 0
    first, again = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "again"))
    assert (first["rounds"], first["params_sha256"]) == (again["rounds"], again["params_sha256"])
    assert "--rounds 4" in call(capsys, "show", tmp_path / "run")[1]


@pytest.mark.thorough
def test_runs_side_by_side_are_named_by_the_options_in_which_they_differ(capsys, tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, alpha, method in zip(folders, (0.5, 0.1, 0.1), ("hiso", "hiso", "decomfl"), strict=True):
        words = ("--cohort", 2, "--batch-size", 4, "--rounds", 1, "--alpha", alpha, "--algorithm", method)
        assert call(capsys, "run", *words, "--out", folder)[0] == 0
    labels = {text.get_text() for axis in tune.figure(*folders).axes for text in axis.texts}
    assert labels >= {"hiso, alpha 0.5", "hiso, alpha 0.1", "decomfl, alpha 0.1"}


def test_the_command_of_a_comparisons_run_makes_it_again(studies, capsys, tmp_path):
    folder = next((studies[0] / "compared" / "runs").glob("*hiso*seed-1"))
    command = tune.reporting.subject_of(folder).command.split()
    assert call(capsys, *command[1:], "--out", tmp_path / "again")[0] == 0
    digests = [
        json.loads((each / "summary.json").read_text())["params_sha256"] for each in (folder, tmp_path / "again")
    ]
    assert digests[0] == digests[1]


def test_a_ratio_of_few_evaluations_is_called_coarse(studies):
    said = studies[1].facts()["coarse"]
    assert "so its ratio is coarse; take a smaller eval_every, or a higher target" in said


@pytest.mark.parametrize(
    ("base", "own", "sentence"),
    [
        (None, None, "No method reached a test accuracy of 0.9 with every seed."),
        (40, None, "No method but the baseline decomfl reached a test accuracy of 0.9 with every seed."),
        (40, 20, "hiso needs 0.5 of the rounds of decomfl to a test accuracy of 0.9, 1 paired seed."),
    ],
)
def test_the_verdict_of_a_comparison(base, own, sentence):
    def run(reached):
        costs = {"bytes_up": 80, "bytes_down": 80, "forward_passes": 80, "simulated_seconds": 80.0}
        to_target = {f"{name}_to_target": reached for name in (*FIGURES,)}
        return {"seed": 0, "rounds": 100, "accuracy": 0.5, "diverged_at_round": None, **costs, **to_target}

    compared = {name: reports.Compared({}, [run(reached)]) for name, reached in (("decomfl", base), ("hiso", own))}
    assert verdict_of(reports.Subject("", compared, fed.Metric("accuracy"), 0.9, "decomfl")) == sentence


def test_a_result_is_drawn(studies):
    assert [axis.get_xlabel() for axis in tune.figure(studies[2]).axes] == ["rounds", "rounds"]


def test_a_directory_reads_as_the_comparison_it_is_of(studies):
    folder, compared, _ = studies
    read, made = read_subject(folder / "compared"), compared.subject()
    assert (read.metric, read.target, read.baseline, list(read.left_out)) == (
        made.metric,
        made.target,
        made.baseline,
        list(made.left_out),
    )
    assert read.results == json.loads(json.dumps(made.results))
    for name, done in made.compared.items():
        for ours, theirs in zip(read.compared[name].histories, done.histories, strict=True):
            assert [dataclasses.replace(row, train_loss=0.0) for row in ours] == [
                dataclasses.replace(row, train_loss=0.0) for row in theirs
            ]


@pytest.mark.parametrize(
    "edit",
    [{"attendance": [1]}, {"concerns": 3}, {"metric": None}, {"rounds": "x"}, {"bytes_up": "many"}, {"accuracy": {}}],
)
def test_an_edited_summary_is_refused(studies, capsys, tmp_path, edit):
    shutil.copytree(studies[0] / "run", tmp_path / "run")
    file = tmp_path / "run" / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    code, _, errors = call(capsys, "report", tmp_path / "run", "--out", tmp_path / "x.html")
    assert code == 2
    assert "paths must be runs whose files are as they were written; " in errors


@pytest.mark.parametrize("edit", [{"learning_rate": "x"}, {"schedule": 3}, {"trials": [{"final": 1}]}, {"runs": [3]}])
def test_an_edited_comparison_is_refused(studies, capsys, tmp_path, edit):
    shutil.copytree(studies[0] / "compared", tmp_path / "compared")
    file = tmp_path / "compared" / "comparison.json"
    content = json.loads(file.read_text())
    content["methods"]["hiso"] |= edit
    file.write_text(json.dumps(content))
    code, _, errors = call(capsys, "report", tmp_path / "compared", "--out", tmp_path / "x.html")
    assert code == 2
    assert errors.count("\n") == 1


def test_text_in_a_report_is_text(studies):
    _, compared, _ = studies
    name = "<img src=x onerror=alert(1)>&'\""
    hostile = dataclasses.replace(compared.subject(), title=name, left_out=["</script><script>alert(1)</script>"])
    hostile = dataclasses.replace(hostile, compared={name: next(iter(compared.compared.values()))}, baseline=None)
    page = Page(reports.as_page([hostile]))
    assert page.stack == []
    assert "x" not in page.addresses
    assert name in page.text
    assert "</script><script>alert(1)</script>" in page.text
    assert {row["method"] for spec in page.specs.values() for row in spec["data"]["values"]} == {name}


def test_the_band_of_five_seeds_is_the_interval_of_the_mean():
    from scipy import stats

    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 3))
    histories = [
        [fed.Evaluation(10 * at, 0.0, {"accuracy": x}, 0, 0, 0, 0.0, 0.0) for at, x in enumerate(each)]
        for each in values
    ]
    line = line_of(histories, "round", "accuracy")
    wanted = stats.t.interval(0.95, 5, values.mean(0), stats.sem(values))
    np.testing.assert_allclose([line.low, line.high], wanted)
    few = line_of(histories[:3], "round", "accuracy")
    np.testing.assert_array_equal(few.high, values[:3].max(0))


def test_of_many_methods_the_best_have_a_colour():
    def run(seed, rounds):
        return {"seed": seed, "rounds_to_target": rounds, "accuracy": 0.5}

    compared = {f"method {n}": reports.Compared({}, [run(0, 100 + n)]) for n in range(12)}
    subject = reports.Subject("", compared, fed.Metric("accuracy"), 0.9, "method 11")
    colors = charts.colors_of(subject)
    grey = [name for name, color in colors.items() if color == charts.GREY]
    assert grey == ["method 7", "method 8", "method 9", "method 10"]
    assert len({*colors.values()}) == 9


@pytest.mark.parametrize("ending", ["pdf", "svg", "png"])
def test_a_figure_for_a_paper(studies, capsys, tmp_path, ending):
    folder, _, _ = studies
    file = tmp_path / f"figure.{ending}"
    assert call(capsys, "plot", folder / "compared", "--columns", 1, "--out", file)[0] == 0
    begins = {"pdf": b"%PDF", "svg": b"<?xml", "png": b"\x89PNG"}[ending]
    assert file.read_bytes().startswith(begins)
    figure = tune.figure(folder / "compared")
    assert figure.get_size_inches()[0] == 7.0
    panels = [axis.get_xlabel() for axis in figure.axes]
    # hiso and decomfl send as much a round, so bytes and passes would show the same curves.
    assert panels == ["rounds", "cost to accuracy 0.12 (decomfl = 1)"]
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(labels) == ["decomfl", "hiso", "target 0.12"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("report", "{folder}"), "paths must be directories of runs or comparisons; .* holds neither"),
        (("report", "{folder}/compared", "--out", "x.txt"), "--out must be a file that ends in .html, got x.txt"),
        (("plot", "{folder}/compared", "--out", "x.gif"), "--out must be a file that ends in .pdf, .svg, .png, got"),
        (("plot", "{folder}/compared", "--against", "time"), "--against must be some of round, bytes_up, .*'time'"),
        (("report", "{folder}/compared", "--out", "/no/where.html"), "--out cannot be written: /no/where.html"),
        (("show", "{folder}/compared"), "holds several runs, the first is .*/compared/runs/0-decomfl-seed-0"),
        (("run", "--out", "{folder}/run"), "--out must be .* does not exist yet; .*/run does; --resume continues what"),
        (
            ("run", "--algorithm", "mine.py"),
            "--algorithm must name what the file defines, as mine.py:NAME; got 'mine.py'",
        ),
        (
            ("compare", "--algorithms", "hiso", "mosaic"),
            "'mosaic' is no option of compare; a list is written with commas",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused(studies, capsys, words, sentence):
    folder = studies[0]
    code, _, errors = call(capsys, *(word.format(folder=folder) for word in words))
    assert code == 2
    assert re.search(sentence, errors), errors


@pytest.mark.thorough
def test_a_browser_draws_every_chart(studies, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium")
    folder, _, _ = studies
    file = tune.report(folder / "compared", folder / "run", out=tmp_path / "report.html")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=10000"]
    for size in ("1280,900", "390,844"):
        done = subprocess.run(
            [browser, *flags, f"--window-size={size}", "--dump-dom", f"file://{file}"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert "CONSOLE" not in done.stderr, done.stderr
        assert done.stdout.count('data-drawn="yes"') == len(Page(file.read_text()).specs)
        assert done.stdout.count('class="marks"') == done.stdout.count('data-drawn="yes"')
