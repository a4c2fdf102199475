"""A user's own method, in a file outside the package, with the same rights as the package's methods."""

import hashlib
import json

import pytest

from hiso_jax import algorithms, choices, fed
from hiso_jax.cli.arguments import parse
from hiso_jax.experiment import given_to
from hiso_jax.tune import Compare
from hiso_jax.version import VERSION
from tests.cli.test_cli import SMALL, call
from tests.marks import slow

MINE = '''
"""Scalars by their running root mean square, then DeComFL: the idea of MEAZO (arXiv 2605.03869)."""
from typing import NamedTuple

import jax.numpy as jnp
import optax

from hiso_jax import zo
from hiso_jax.fed import Algorithm


class RmsState(NamedTuple):
    second: object


def scale_by_scalar_rms(decay):
    def init(params):
        return RmsState(jnp.float32(1))

    def update(scalars, state, params=None, **extra):
        second = decay * state.second + (1 - decay) * jnp.mean(jnp.square(scalars))
        return scalars / (jnp.sqrt(second) + 1e-8), RmsState(second)

    return optax.GradientTransformationExtraArgs(init, update)


def meazo(learning_rate, *, scalar_decay: float = 0.9, sampler: zo.SamplerName = "gaussian"):
    """One scalar of adaptivity.

    Args:
      scalar_decay: the weight that the mean square of the scalars keeps.
      sampler: family of raw perturbations.
    """
    head = zo.scale_by_zo(sampler=sampler)
    return Algorithm(optax.chain(scale_by_scalar_rms(scalar_decay), head, optax.scale_by_learning_rate(learning_rate)))
'''
OPTIONS = [*SMALL, "--rounds-per-dispatch", "2", "--learning-rate", "0.01", "--scalar-decay", "0.5"]


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path / 'mine.py'}:meazo"


def test_the_file_is_as_short_as_promised():
    assert len(MINE.strip().splitlines()) <= 40


def test_it_runs_is_killed_goes_on_and_is_replayed_and_exported(capsys, tmp_path, mine, monkeypatch):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert call(capsys, "run", *OPTIONS, "--algorithm", mine, "--out", whole)[0] == 0
    wanted = json.loads((whole / "summary.json").read_text())["params_sha256"]

    def kill(self, records, original=fed.ledger.FileLedger.append):
        original(self, records)
        if self.rounds == 6:
            raise SystemExit(137)

    monkeypatch.setattr(fed.ledger.FileLedger, "append", kill)
    assert call(capsys, "run", *OPTIONS, "--algorithm", mine, "--out", run)[0] == 137
    monkeypatch.undo()

    code, _, errors = call(capsys, "run", "--resume", run)
    assert code == 2
    assert errors.startswith("hiso-jax: error: --algorithm must be given again, as FILE:NAME: the run's is its")
    assert call(capsys, "run", "--resume", run, "--algorithm", mine)[0] == 0
    assert json.loads((run / "summary.json").read_text())["params_sha256"] == wanted

    about = fed.load(run).header["about"]
    assert about["algorithm_sha256"] == hashlib.sha256(MINE.encode()).hexdigest()
    assert about["scalar_decay"] == 0.5
    assert "algorithm must be given again" in call(capsys, "replay", run)[2]
    code, text, _ = call(capsys, "replay", run, "--algorithm", mine)
    assert code == 0
    assert "equal to the run's, bit for bit" in text
    delta, model = tmp_path / "delta.safetensors", tmp_path / "model.safetensors"
    assert call(capsys, "export", run, "--out", delta)[0] == 0
    assert "algorithm must be given again" in call(capsys, "apply", delta, "--out", model)[2]
    assert ", the run's" in call(capsys, "apply", delta, "--out", model, "--algorithm", mine)[1]


def test_another_file_is_not_the_runs(capsys, tmp_path, mine):
    assert call(capsys, "run", *OPTIONS, "--algorithm", mine, "--out", tmp_path / "run")[0] == 0
    (tmp_path / "other.py").write_text(MINE.replace("1e-8", "1e-7"))
    code, _, errors = call(capsys, "replay", tmp_path / "run", "--algorithm", f"{tmp_path / 'other.py'}:meazo")
    assert code == 2
    assert "--algorithm must be the file that the run was made with; the SHA-256" in errors


@pytest.mark.thorough
@pytest.mark.parametrize("rates", [["--learning-rate", "0.01"], slow(["--learning-rate", "0.003,0.01"])])
def test_it_is_compared_and_tuned(capsys, tmp_path, mine, rates):
    options = [*SMALL, "--algorithms", f"decomfl,{mine},decomfl+median", "--seeds", "1", *rates]
    code, text, errors = call(capsys, "compare", *options, "--out", tmp_path / "comparison")
    assert (code, errors) == (0, "")
    rows = [line.split()[0] for line in text.splitlines() if line.startswith((" decomfl", " meazo", " +"))]
    # The channels of a method are on lines of their own.
    assert rows[-4:] == ["decomfl", "meazo", "decomfl", "+median"]
    methods = json.loads((tmp_path / "comparison" / "comparison.json").read_text())["methods"]
    runs = {name: each["runs"] for name, each in methods.items()}
    assert {run["bytes_up"] for each in runs.values() for run in each} == {12 * 4 * (8 + 4 * 2)}


@pytest.mark.thorough
def test_first_order_methods_stand_beside_them_with_their_true_bytes(capsys, tmp_path):
    options = [*SMALL, "--algorithms", "sign,fed_avg", "--learning-rate", "0.01,0.3", "--seeds", "1"]
    code, _, errors = call(capsys, "compare", *options, "--out", tmp_path / "comparison")
    assert (code, errors) == (0, "")
    methods = json.loads((tmp_path / "comparison" / "comparison.json").read_text())["methods"]
    runs = {name: each["runs"] for name, each in methods.items()}
    sizes = {name: each[0]["bytes_up"] / 48 for name, each in runs.items()}
    assert sizes == {"sign": 8 + 1, "fed_avg": 8 + 4 * 2410}


def test_what_needs_scalars_refuses_a_first_order_run_in_one_sentence(capsys, tmp_path):
    out = tmp_path / "run"
    options = [name for name in SMALL if name not in ("--perturbations", "2")]
    assert call(capsys, "run", *options, "--algorithm", "fed_avg", "--out", out)[0] == 0
    for command in (["replay", out], ["export", out], ["export", out, "--format", "hf"]):
        code, text, errors = call(capsys, *command)
        assert (code, text) == (2, "")
        assert errors.count("\n") == 1
        assert "is a run of a method without scalars, whose messages are as large as the model" in errors
    assert call(capsys, "show", out)[0] == 0


@pytest.mark.thorough
def test_fed_avg_learns_the_digits_by_default(capsys, tmp_path):
    assert call(capsys, "run", "--algorithm", "fed_avg", "--rounds", "600", "--out", tmp_path / "run")[0] == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["accuracy"] >= 0.95


@pytest.mark.parametrize(
    ("content", "name", "sentence"),
    [
        ("x = 1", "f", "names a function that"),
        ("raise RuntimeError('no')", "f", "names a file that fails"),
        ("def f(rate, other): pass", "f", "must be a function (learning_rate, *, option=default, …) → Algorithm"),
        ("def f(rate, *, other): pass", "f", "must be a function"),
        ("def f(rate): return 3", "f", "must return a hiso_jax.fed.Algorithm or an optax transformation, got a int"),
        ("def f(rate): return 3", "f+nothing", "must go through one of clip, clip_to_median, colluding"),
    ],
)
def test_a_file_that_holds_no_method_is_one_sentence(capsys, tmp_path, monkeypatch, content, name, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.py").write_text(content)
    code, text, errors = call(capsys, "run", "--algorithm", f"file.py:{name}", "--learning-rate", "0.1")
    assert (code, text) == (2, "")
    assert errors.count("\n") == 1
    assert sentence in errors
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["file.py"]


def test_a_method_without_a_rate_of_its_own_asks_for_one(capsys, tmp_path, mine):
    code, _, errors = call(capsys, "run", "--algorithm", mine)
    assert code == 2
    assert "--learning-rate must be given, or be auto: " in errors


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--algorithm", "decomfl", "--curvature-decay", "0.5"],
            "--curvature-decay is an option of hiso, hiso_by_direction, hiso_frozen, hiso_isotropic, ",
        ),
        (
            ["--partition", "iid", "--alpha", "3"],
            "--alpha is an option of --partition dirichlet, dirichlet-balanced; it would have no effect with --part",
        ),
        (["--shards-per-client", "7"], "--shards-per-client is an option of --partition shards; it would have no"),
        (
            ["--task", "digits", "--data-dir", "X"],
            "--data-dir is an option of --task mnist, fashion-mnist, cifar10 and 15 more",
        ),
        (["--availability-rate", "0.5"], "--availability-rate is an option of --availability bernoulli, per-client"),
        (
            ["--availability", "bernoulli", "--rounds-per-day", "3"],
            "--rounds-per-day is an option of --availability diurnal; it would have no effect with --availability bern",
        ),
        (
            ["--algorithm", "fed_avg", "--local-steps", "2", "--local-learning-rate", "1"],
            "--local-learning-rate is read by",
        ),
        (
            ["--algorithm", "local_mosaic", "--directions", "keep"],
            "--directions is read by methods that measure finite",
        ),
        (["--algorithm", "fed_avg", "--mu", "0.1"], "--mu is read by methods that measure finite differences"),
        (["--algorithm", "fed_avg", "--difference", "central"], "--difference is read by methods that measure"),
        (["--client-examples", "3,4"], "--client-examples is read by virtual clients"),
        (["--algorithm", "decomfl+trimmed_mean", "--trim", "0.7"], "--trim must be at least 0 and below 0.5, got 0.7"),
        (
            ["--trim", "0.1"],
            "--trim is an option of the channel trimmed_mean, which hiso+trimmed_mean, say, goes through",
        ),
        (["--algorithm", "fed_avg", "--snapshot-every", "5"], "--snapshot-every is read by methods with scalars"),
        (["--resume", "x", "--algorithm", "hiso"], "--algorithm cannot be given with --resume: the run has its own"),
        (["--resume", "x", "--curvature-decay", "0.95"], "--curvature-decay cannot be given with --resume"),
        (["--learnig-rate", "3"], "--learnig-rate is no option of run; did you mean --learning-rate?"),
        (["--lr", "3"], "--lr is no option of run; did you mean --learning-rate?"),
        (["--data", "digits"], "--data is no option of run; did you mean --task?"),
        (["--method", "mosaic"], "--method is called --difference now; did you mean --algorithm?"),
        (["--curvature_decay", "3"], "--curvature-decay must be between 0 and 1, got 3.0"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(capsys, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    code, text, errors = call(capsys, "run", *arguments)
    assert (code, text) == (2, "")
    assert errors.count("\n") == 1
    assert errors.startswith(f"hiso-jax: error: {sentence}")
    assert list(tmp_path.iterdir()) == []


def test_help_is_grouped_and_shows_a_methods_own_options(capsys):
    _, text, _ = call(capsys, "run", "--help-all")
    places = [text.index(f"  --{name} ") for name in ("task", "algorithm", "rounds", "learning-rate", "model", "alpha")]
    assert places == sorted(places)
    assert text.index("--learning-rate") < text.index("hiso options") < text.index("--curvature-decay")
    assert text.index("partition dirichlet options") < text.index("--alpha")
    _, text, _ = call(capsys, "run", "--algorithm", "fed_prox", "--help-all")
    assert "--proximal" in text
    assert "--curvature-decay" not in text


def test_alone_it_prints_help_and_it_knows_its_version(capsys):
    code, text, errors = call(capsys)
    assert (code, errors) == (0, "")
    for command in ("run", "sweep", "compare", "replay", "export", "apply", "show"):
        assert f"\n  {command} " in text
    code, text, _ = call(capsys, "--version")
    assert (code, text) == (0, f"hiso-jax {VERSION}\n")


def test_methods_that_share_an_option_have_their_own_defaults(tmp_path):
    (tmp_path / "two.py").write_text(
        "from hiso_jax import algorithms\n"
        "def one(rate, *, beta: float = 0.1): return algorithms.zo_momentum(rate, beta=beta)\n"
        "def two(rate, *, beta: float = 0.8): return algorithms.zo_momentum(rate, beta=beta)\n"
    )
    names = [f"{tmp_path / 'two.py'}:{name}" for name in ("one", "two")]

    def given(*words):
        options = parse(Compare, "compare", ["--algorithms", ",".join(names), *words])
        return [given_to(algorithms.load(name), options) for name in names]

    # A factory uses its own default for an option that is not passed on.
    assert given() == [{"guard": True, "anchor_decay": 0.0}] * 2
    assert given("--beta", "0.5") == [{"beta": 0.5, "guard": True, "anchor_decay": 0.0}] * 2


BAD_FILES = {
    "an option of the command": (
        "def f(rate, *, rounds: int = 2): pass",
        "an option rounds, which is the command's own",
    ),
    "an option of the partition": (
        "def f(rate, *, alpha: float = 2.0): pass",
        "must agree on what alpha is, and do not",
    ),
    "an option called help": ("def f(rate, *, help: int = 2): pass", "an option help, which is the command's own"),
    "no such type": ("def f(rate, *, x: 'Nothing' = 1): pass", "an option x that cannot be one"),
    "no plain default": ("def f(rate, *, x=lambda y: y): pass", "an option x that cannot be one"),
    "it fails": ("def f(rate): return 1 / 0", "fails: ZeroDivisionError"),
    "it ends the process": ("import sys; sys.exit(7)", "names a file that fails"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_what_cannot_be_a_method_is_one_sentence(capsys, tmp_path, what):
    content, sentence = BAD_FILES[what]
    (tmp_path / "file.py").write_text(content)
    code, text, errors = call(capsys, "run", "--algorithm", f"{tmp_path / 'file.py'}:f", "--learning-rate", "0.1")
    assert (code, text, errors.count("\n")) == (2, "", 1)
    assert sentence in errors


def test_files_with_dataclasses_and_folders_with_a_plus_are_fine(tmp_path):
    folder = tmp_path / "a+b"
    folder.mkdir()
    (folder / "file.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from hiso_jax import algorithms\n"
        "@dataclass\n"
        "class Setting:\n"
        "    rate: float\n"
        "def f(rate, *, beta: float = 0.5): return algorithms.zo_momentum(Setting(rate).rate, beta=beta)\n"
    )
    method = algorithms.load(f"{folder / 'file.py'}:f+median+clip")
    assert method.channels == ("median", "clip")
    assert list(method.options)[:2] == ["beta", "clip_norm"]
    # The two are the guard and the clipping.
    assert len(method.build(0.1, {}).rescale) == 2


def test_another_function_of_the_same_file_is_not_the_runs(capsys, tmp_path):
    (tmp_path / "two.py").write_text(
        "from hiso_jax import algorithms\n"
        "def one(rate): return algorithms.fed_avg(rate)\n"
        "def other(rate): return algorithms.fed_prox(rate)\n"
    )
    out, options = tmp_path / "run", [name for name in SMALL if name not in ("--perturbations", "2")]
    file = tmp_path / "two.py"
    assert call(capsys, "run", *options, "--algorithm", f"{file}:one", "--learning-rate", "0.1", "--out", out)[0] == 0
    code, _, errors = call(capsys, "run", "--resume", out, "--algorithm", f"{file}:other")
    assert code == 2
    assert "--algorithm must be the run's, " in errors


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("sign", (1, 1)),
        ("sign+mean", (1, 32)),
        ("sign+median", (1, 32)),
        ("sign+clip", (1, 1)),
        ("decomfl+signs+majority", (1, 1)),
        ("hiso+trimmed_mean", (32, 32)),
    ],
)
def test_the_bits_of_a_message_are_those_of_what_it_last_went_through(name, bits):
    wire = algorithms.load(name).build(0.1, {}).wire
    assert (wire.up_bits, wire.down_bits) == bits


def test_messages_are_combined_once():
    with pytest.raises(ValueError, match=r"algorithm hiso\+mean\+median must go through one combiner at most"):
        algorithms.load("hiso+mean+median")


def test_methods_of_other_packages_are_found(monkeypatch):
    class Point:
        name = "theirs"

        def load(self):
            return algorithms.zo_adam

    monkeypatch.setattr(choices, "entry_points", lambda group: [Point()] if group == "hiso_jax.algorithms" else [])
    assert "theirs" in algorithms.available()
    assert algorithms.load("theirs+median").factory is algorithms.zo_adam


ATTACKED = '''
"""DeComFL where exactly two of every cohort send a hundred times the opposite."""
from dataclasses import replace

import jax
import jax.numpy as jnp

from hiso_jax import algorithms, channels
from hiso_jax.fed import Send


def opposite(messages, senders, key):
    return jax.tree.map(lambda m: jnp.where((senders.places < 2)[:, None, None], -100 * m, m), messages)


def attacked(learning_rate, *, median: bool = False):
    """Attacked.

    Args:
      median: whether the server takes the median.
    """
    algorithm = algorithms.decomfl(learning_rate)
    combine = channels.median() if median else algorithm.combine
    return replace(algorithm, send=(Send(opposite),), combine=combine)


def defended(learning_rate):
    return attacked(learning_rate, median=True)
'''


@pytest.mark.slow
def test_a_median_withstands_what_wrecks_a_mean(capsys, tmp_path):
    """On the digits with defaults, the median stays within six points of no attack; the mean diverges."""
    (tmp_path / "attack.py").write_text(ATTACKED)
    names = ["decomfl", f"{tmp_path / 'attack.py'}:attacked", f"{tmp_path / 'attack.py'}:defended"]
    options = ["--algorithms", ",".join(names), "--learning-rate", "0.03", "--seeds", "2"]
    code, text, _ = call(capsys, "compare", *options, "--out", tmp_path / "comparison")
    assert code == 0
    assert "attacked" in text
    methods = json.loads((tmp_path / "comparison" / "comparison.json").read_text())["methods"]
    runs = {name: each["runs"] for name, each in methods.items()}
    honest, attacked, defended = (runs[name] for name in names)
    assert all(run["diverged_at_round"] is not None for run in attacked)
    for one, other in zip(honest, defended, strict=True):
        assert other["accuracy"] >= one["accuracy"] - 0.06
