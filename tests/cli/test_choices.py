"""A user's own partition, availability, schedule and task, in a file outside the package."""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import pytest

import hiso_jax
from hiso_jax import algorithms, choices, fed
from hiso_jax.checks import ParameterError
from hiso_jax.cli.main import main
from hiso_jax.experiment import KINDS, NESTED

MINE = '''
"""Digits of one half of the images, split by regions; clients that come in turns; a rate that warms up."""
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from hiso_jax import fed, tasks
from hiso_jax.choices import defaults


@defaults(rounds=12, clients=20, cohort=4, partition="iid")
def half(seed, *, share: float = 0.5):
    """A part of the digits.

    Args:
      share: share of the training images.
    """
    task = tasks.digits()
    kept = int(share * len(task.train["label"]))
    return tasks.Classification(
        model_init=task.model_init, model_apply=task.model_apply, test=task.test, name="half", target=0.9,
        train={name: array[:kept] for name, array in task.train.items()},
    )


def by_region(train, clients, seed, *, regions: int = 5, share: float = 0.5):
    """Clients of one region hold neighbouring examples.

    Args:
      regions: number of regions.
      share: share of the training images.
    """
    if regions < 1:
        raise ValueError("regions must be at least 1")
    example = np.arange(len(train["label"]))
    owners = example % regions + regions * (example % (clients // regions))
    return fed.by_column(owners)[0]


def turns(*, period: int = 2):
    """Every client comes once in so many rounds, in the mean.

    Args:
      period: rounds from one to the next.
    """
    return fed.Bernoulli(1 / period)


def warmup(learning_rate, rounds, *, warmup_rounds: int = 3):
    """The rate grows along a line at first.

    Args:
      warmup_rounds: rounds until it is whole.
    """
    return lambda count: learning_rate * jnp.minimum(1.0, (count + 1) / warmup_rounds)
'''
NUMBERS = ["--perturbations", "2", "--eval-every", "4", "--rounds-per-dispatch", "2", "--batch-size", "8"]
OPTIONS = ["--regions", "4", "--share", "0.4", "--period", "3", "--warmup-rounds", "5"]


def call(capsys, *words):
    with pytest.raises(SystemExit) as ending:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    return ending.value.code or 0, printed.out, printed.err


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    names = {"task": "half", "partition": "by_region", "availability": "turns", "schedule": "warmup"}
    return {kind: f"{tmp_path / 'mine.py'}:{name}" for kind, name in names.items()}


def words(mine, *kinds):
    return [word for kind in kinds or mine for word in (f"--{kind}", mine[kind])]


def test_own_choices_run_are_killed_go_on_and_are_replayed(capsys, tmp_path, mine, monkeypatch):
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = [*words(mine), *OPTIONS, *NUMBERS, "--learning-rate", "0.02"]
    assert call(capsys, "run", *options, "--out", whole)[::2] == (0, "")
    wanted = json.loads((whole / "summary.json").read_text())["params_sha256"]
    about = fed.load(whole).header["about"]
    # The ledger has the task's own defaults and the given options; the task and the partition both have the share.
    assert (about["rounds"], about["clients"], about["regions"], about["share"]) == (12, 20, 4, 0.4)

    def kill(self, records, original=fed.ledger.FileLedger.append):
        original(self, records)
        if self.rounds == 6:
            raise SystemExit(137)

    monkeypatch.setattr(fed.ledger.FileLedger, "append", kill)
    assert call(capsys, "run", *options, "--out", run)[0] == 137
    monkeypatch.undo()
    code, _, errors = call(capsys, "run", "--resume", run)
    assert (code, "--task must be given again, as FILE:NAME" in errors) == (2, True)
    assert call(capsys, "run", "--resume", run, *words(mine))[0] == 0
    assert json.loads((run / "summary.json").read_text())["params_sha256"] == wanted
    code, text, _ = call(capsys, "replay", run, *words(mine, "task", "schedule"))
    assert (code, "equal to the run's, bit for bit" in text) == (0, True)
    assert "--regions 4" in call(capsys, "show", run)[1]


@pytest.mark.thorough
def test_own_choices_are_swept_and_compared(capsys, tmp_path, mine):
    options = [*words(mine, "task", "partition", "availability"), *OPTIONS[:6], *NUMBERS, "--seeds", "1"]
    options += ["--learning-rate", "0.01,0.02", "--algorithms", "decomfl"]
    sweep = [*options, *words(mine, "schedule"), "--warmup-rounds", "5", "--out", tmp_path / "sweep"]
    assert call(capsys, "sweep", *sweep)[::2] == (0, "")
    compare = [*options, "--schedules", f"constant,{mine['schedule']}", "--tuning-seeds", "1"]
    code, _, errors = call(capsys, "compare", *compare, "--out", tmp_path / "comparison")
    assert (code, errors) == (0, "")
    tuned = json.loads((tmp_path / "comparison" / "tuning.json").read_text())["trials"]
    assert {trial["schedule"] for trial in tuned} == {"constant", mine["schedule"]}
    again = words(mine, "task", "partition", "availability")
    assert call(capsys, "sweep", "--resume", tmp_path / "sweep", *again, *words(mine, "schedule"))[0] == 0
    resumed = ["compare", "--resume", tmp_path / "comparison", *again]
    code, _, errors = call(capsys, *resumed)
    assert code == 2
    assert f"--schedules must name {mine['schedule']} again" in errors
    code, text, _ = call(capsys, *resumed, "--schedules", mine["schedule"])
    assert (code, "all 12 rounds are done" in text) == (0, True)
    (run,) = (tmp_path / "comparison" / "runs").iterdir()
    code, text, _ = call(capsys, "replay", run, *words(mine, "task", "schedule"))
    assert (code, "equal to the run's, bit for bit" in text) == (0, True)
    (path := Path(mine["schedule"].partition(":")[0])).write_text(path.read_text() + "\n")
    code, _, errors = call(capsys, *resumed, "--schedules", mine["schedule"])
    assert (code, "--schedules must be the files that the study began with" in errors) == (2, True)


def test_an_own_choice_is_refused_in_one_sentence(capsys, tmp_path, mine, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, sentence in [
        ([*words(mine, "partition"), "--regions", "0"], "regions must be at least 1"),
        ([*words(mine, "partition"), "--alpha", "1"], "--alpha is an option of --partition dirichlet"),
        (["--partition", "mine.py:nothing"], "--partition mine.py:nothing names a function that mine.py does not have"),
        (["--partition", "no.py:x"], "--partition names a file that cannot be read: no.py"),
        (["--availability", "mine.py:warmup"], "--availability mine.py:warmup must be a function (*, option=default"),
        (["--regions", "3"], "--regions is no option of run"),
    ]:
        code, _, errors = call(capsys, "run", *given, *NUMBERS)
        assert (code, errors.count("\n")) == (2, 1)
        assert sentence in errors


def test_two_choices_must_agree_on_an_option_that_both_have():
    def first(*, share: float = 0.5): ...

    def second(*, share: float = 0.5, rest: int = 1): ...

    def third(*, share: int = 1): ...

    kind = choices.Kind("kind", {"first": first, "second": second, "third": third})
    both = choices.shared_options([kind.load("first"), kind.load("second")])
    assert {name: option.default for name, option in both.items()} == {"share": 0.5, "rest": 1}
    with pytest.raises(ParameterError, match="kind third and kind first must agree on what share is, and do not"):
        choices.shared_options([kind.load("first"), kind.load("third")])


def test_a_factory_that_wraps_another_has_its_options_and_their_help():
    """``local_mosaic`` wraps ``mosaic`` in this way; its own text of an option replaces the original text."""

    @functools.wraps(algorithms.mosaic, assigned=["__annotations__"], updated=())
    def wrapping(learning_rate, **options):
        """Another.

        Args:
          clipping: clipping as it is here.
        """
        return learning_rate, options

    kind = choices.Kind("algorithm", {"mosaic": algorithms.mosaic, "wrapping": wrapping}, ("learning_rate",))
    found, original = kind.load("wrapping"), kind.load("mosaic")
    assert found.inputs == ("learning_rate",)
    text = found.options["clipping"].text
    assert text == "clipping as it is here."
    assert found.options == {
        **original.options,
        "clipping": dataclasses.replace(original.options["clipping"], text=text),
    }
    assert found.build({"momentum": 0.5, "rank": 3}, 0.1) == (0.1, {"momentum": 0.5})


def test_a_name_may_be_typed_with_dashes_or_underscores():
    def two_words(): ...

    kind = choices.Kind("kind", {"two-words": two_words})
    assert kind.load("two_words").name == kind.load("two-words").name == "two-words"


SAMPLER = '''
import jax
import jax.numpy as jnp


def uniform(*, spread: float = 1.0):
    """Uniform numbers of variance 1.

    Args:
      spread: a factor, 1 for E[u uᵀ] = I.
    """
    def sample(key, shape, dtype):
        return spread * jnp.sqrt(jnp.asarray(3, dtype)) * jax.random.uniform(key, shape, dtype, -1, 1)

    return sample


def norms():
    """The norms of a language model."""
    from hiso_jax.models.lm import tune
    return lambda pretrained, seed: tune(pretrained, r"norm[.]scale$", seed=seed)
'''


@pytest.mark.thorough
def test_a_sampler_of_ones_own_runs_and_is_replayed(capsys, tmp_path):
    (tmp_path / "mine.py").write_text(SAMPLER)
    mine, run = f"{tmp_path / 'mine.py'}:uniform", tmp_path / "run"
    options = ["--rounds", "6", "--clients", "20", "--cohort", "4", *NUMBERS, "--sampler", mine, "--spread", "0.5"]
    assert call(capsys, "run", *options, "--out", run)[::2] == (0, "")
    assert fed.load(run).header["about"]["spread"] == 0.5
    assert "--sampler must be given again, as FILE:NAME" in call(capsys, "replay", run)[2]
    code, text, _ = call(capsys, "replay", run, "--sampler", mine)
    assert (code, "equal to the run's, bit for bit" in text) == (0, True)
    assert call(capsys, "run", "--resume", run, "--sampler", mine, "--rounds", "8")[::2] == (0, "")
    # The command ``show`` does not execute code that a run names.
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    assert "--spread 0.5" in call(capsys, "show", run)[1]
    assert not (tmp_path / "was_run").exists()
    low = ["--rounds", "2", "--clients", "20", "--cohort", "4", *NUMBERS, "--sampler", "low_rank", "--rank", "2"]
    assert call(capsys, "run", *low, "--out", tmp_path / "low")[::2] == (0, "")
    assert (
        "--rank is an option of --sampler low_rank; it would have no effect with --sampler gaussian"
        in call(capsys, "run", "--rank", "2")[2]
    )


@pytest.mark.thorough
def test_what_is_trained_may_be_ones_own(capsys, tmp_path):
    from tests.tasks.text.problems import data_folder, model_folder

    (tmp_path / "mine.py").write_text(SAMPLER)
    model, data = model_folder(tmp_path / "model"), data_folder(tmp_path / "data")
    words = ["--task", "text-classification", "--model", model, "--data-dir", data, "--template", "{text} It was"]
    words += ["--verbalizer", " bad, good", "--rounds", "2", "--clients", "4", "--cohort", "2", "--batch-size", "4"]
    digests = set()
    for trainable in (f"{tmp_path / 'mine.py'}:norms", "norm[.]scale$"):
        out = tmp_path / f"run-{len(digests)}"
        options = [*words, "--perturbations", "1", "--eval-every", "2", "--learning-rate", "1e-3"]
        assert call(capsys, "run", *options, "--trainable", trainable, "--out", out)[::2] == (0, "")
        digests.add(json.loads((out / "summary.json").read_text())["params_sha256"])
    assert len(digests) == 1


def test_nothing_is_imported_that_does_not_look_like_a_users_code(tmp_path, monkeypatch):
    """A recorded name that does not look like a user's code is loaded, so loading it must not execute a file."""
    (tmp_path / "my-module.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my-module:x", "my module:x", "my-module.py:not a name"):
        assert not choices.is_foreign(name)
        for kind in (KINDS["partition"], algorithms.ALGORITHMS, NESTED["sampler"]):
            with pytest.raises(ParameterError, match="must be one of"):
                kind.load(name)
        assert NESTED["trainable"].load(name).build({}).name == name
    assert not (tmp_path / "was_run").exists()


def test_a_users_file_imports_the_files_beside_it(tmp_path):
    (tmp_path / "beside_it.py").write_text("CLIENTS = 7\n")
    (tmp_path / "own.py").write_text(
        "from beside_it import CLIENTS\nfrom hiso_jax import fed\n"
        "def mine(train, clients, seed):\n    return fed.iid(len(train['label']), CLIENTS)\n"
    )
    experiment = hiso_jax.Experiment(partition=f"{tmp_path}/own.py:mine", rounds=1, cohort=2)
    assert experiment.population.num_clients == 7
    assert str(tmp_path) not in sys.path
