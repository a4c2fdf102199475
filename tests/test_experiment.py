"""An experiment from Python is the one that the command line runs."""

import json

import pytest

import hiso_jax
from hiso_jax import fed, tasks
from hiso_jax.fed.ledger import LEDGER
from tests.cli.test_cli import call
from tests.marks import thorough

NUMBERS = {"rounds": 8, "clients": 20, "cohort": 4, "perturbations": 2, "batch_size": 8, "eval_every": 4}
CASES = [
    {"algorithm": "mosaic", "alpha": 0.1, "availability": "bernoulli", "availability_rate": 0.7},
    {"algorithm": "decomfl", "partition": "shards", "shards_per_client": 3, "schedule": "cosine", "combine": "median"},
    {"algorithm": "hiso", "local_steps": 2, "schedule": "inverse-sqrt", "momentum": 0.5, "learning_rate": 0.01},
    {"algorithm": "hiso+median", "attack": "sign_flip", "attackers": 0.25, "model": "cnn", "weighting": "uniform"},
]


@pytest.mark.parametrize("case", CASES[:1] + [thorough(each) for each in CASES[1:]])
def test_it_is_the_run_of_the_command_line(capsys, tmp_path, case):
    result = hiso_jax.Experiment(**NUMBERS, **case).run(tmp_path / "python")
    words = [word for name, value in {**NUMBERS, **case}.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert call(capsys, "run", *words, "--out", tmp_path / "command")[0] == 0
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("python", "command")]
    digests = {each["params_sha256"] for each in summaries} | {fed.fingerprint(result.params)}
    assert len(digests) == 1
    # The command line records more: entries about devices and folders.
    abouts = [fed.load(tmp_path / run).header["about"] for run in ("python", "command")]
    assert abouts[0].items() <= abouts[1].items()
    names = [{path.name for path in (tmp_path / run).iterdir()} for run in ("python", "command")]
    assert names[0] == names[1]
    config = json.loads((tmp_path / "python" / "config.json").read_text())
    assert config == abouts[0] | {"out": str(tmp_path / "python")}
    code, text, _ = call(capsys, "replay", tmp_path / "python")
    assert (code, "equal to the run's, bit for bit" in text) == (0, True)


def test_its_parts_may_be_values(tmp_path):
    task = tasks.digits()
    population = fed.iid(len(task.train["label"]), 20, seed=3)
    tx, numbers = hiso_jax.hiso(0.02), {name: value for name, value in NUMBERS.items() if name != "clients"}
    experiment = hiso_jax.Experiment(task=task, algorithm=tx, population=population, **numbers)
    config = fed.SimulationConfig(**numbers)
    wanted = fed.Simulation(task, tx, population, config, participation=experiment.participation).run()
    assert fed.fingerprint(experiment.run(tmp_path / "run").params) == fed.fingerprint(wanted.params)
    assert repr(experiment).startswith("Experiment(task=Classification, algorithm=GradientTransformationExtraArgs, ")
    # An experiment that is made again continues the run.
    assert experiment.replace(rounds=12).run(tmp_path / "run", resume=True).rounds == 12
    assert (tmp_path / "run" / LEDGER).exists()


@pytest.mark.thorough
def test_a_value_takes_several_local_steps_at_a_rate_that_is_given():
    numbers = {**NUMBERS, "local_steps": 2, "local_learning_rate": 0.02}
    experiment = hiso_jax.Experiment(algorithm=hiso_jax.hiso(0.02), **numbers)
    assert experiment.config.local_learning_rate == 0.02
    wanted = fed.Simulation(
        experiment.task,
        hiso_jax.hiso(0.02),
        experiment.population,
        experiment.config,
        participation=experiment.participation,
    )
    assert fed.fingerprint(experiment.run().params) == fed.fingerprint(wanted.run().params)
    assert experiment.replace(local_learning_rate=0.03).config.local_learning_rate == 0.03


def test_it_is_frozen_and_made_anew():
    experiment = hiso_jax.Experiment(**NUMBERS)
    assert experiment.replace(cohort=3).config.cohort == 3
    assert experiment.config.cohort == 4
    with pytest.raises(AttributeError):
        experiment.task = None


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"partition": "iid", "alpha": 0.3},
            "alpha is an option of `partition` dirichlet, dirichlet-balanced; it would",
        ),
        ({"learnig_rate": 1.0}, "learnig_rate is no option of an experiment; did you mean `learning_rate`?"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"task": "cifar"}, "task must be one of digits"),
        ({"combine": "mode"}, "combine must be one of clip, "),
        ({"curvature_decay": 0.5, "algorithm": "decomfl"}, "curvature_decay is an option of hiso, "),
        ({"algorithm": hiso_jax.hiso(0.1), "guard": True}, "guard must be a part of the algorithm that is given as a"),
        (
            {"algorithm": hiso_jax.hiso(0.1), "combine": "median"},
            "combine must be a part of the algorithm that is given",
        ),
        ({"algorithm": "hiso", "local_learning_rate": 0.1}, "local_learning_rate is read by methods that send scalars"),
        ({"algorithm": hiso_jax.hiso(0.1), "learning_rate": 0.1}, "learning_rate must not be given beside an"),
        ({"population": fed.iid(1437, 9), "clients": 9}, "population must not be given beside `partition` or"),
        ({"algorithm": "hiso+median", "attackers": 0.2}, "attackers must be given with `attack`"),
    ],
)
def test_what_cannot_be_is_one_sentence(given, sentence):
    with pytest.raises(hiso_jax.ParameterError) as refused:
        hiso_jax.Experiment(**given)
    assert str(refused.value).startswith(sentence)


@pytest.mark.thorough
def test_a_rate_is_looked_for():
    experiment = hiso_jax.Experiment(**NUMBERS, algorithm="decomfl", learning_rate="auto", probe_rounds=4)
    assert 0 < experiment.learning_rate < 1
