"""Each machine reads its own part of the data: the server none or the test split, a client its training examples."""

import numpy as np
import pytest

from hiso_jax import fed, network
from hiso_jax.algorithms import load
from hiso_jax.checks import ParameterError
from hiso_jax.cli.join import Join, builder
from hiso_jax.experiment import about_of, resolve
from hiso_jax.experiment.settings import Single
from hiso_jax.network.client import _split
from hiso_jax.network.study import experiment_of, read_study, run_study
from tests.tasks.text.problems import model_folder, reviews, write_rows

CLIENTS, SHARE = 2, 0.25


def study_of(folder, text, held_out=SHARE):
    path = folder / "study.toml"
    path.write_text(
        f"{text}\nrounds = 2\ncohort = {CLIENTS}\neval_every = 1\nbatch_size = 4\n"
        f"[network]\nclients = {CLIENTS}\nheld_out = {held_out}\n"
    )
    return read_study(path)


def client(number, data=None, **given):
    return network.Client(None, data, builder(Join(server="host:1", data=data and "data.npz", **given)), number)


def images(number):
    draws = np.random.default_rng(number)
    count = 12 + number
    return {
        "input": draws.integers(0, 256, (count, 28, 28, 1), np.uint8),
        "label": draws.integers(0, 10, count).astype(np.int32),
    }


def test_neither_server_nor_clients_need_the_files_of_a_task_whose_examples_clients_bring(tmp_path):
    study = study_of(tmp_path, 'task = "mnist"\nmodel = "mlp"\nalgorithm = "decomfl"')
    data = {number: images(number) for number in range(CLIENTS)}
    transport = network.InProcess({number: client(number, own) for number, own in data.items()})
    result = run_study(study, transport, out=tmp_path / "run", say=lambda line: None)
    assert (result.rounds, result.attendance["reported"]) == (2, 2 * CLIENTS)
    held = [_split(data[number], SHARE)[1] for number in range(CLIENTS)]
    whole = {name: np.concatenate([own[name] for own in held]) for name in held[0]}
    metrics = experiment_of(study).task.metrics(result.params, whole)
    expected = {name: float(np.mean(np.asarray(each, np.float64))) for name, each in metrics.items()}
    assert result.metrics[-1].metrics == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


def text(model, more="", columns='template = "{text} It was"\nverbalizer = [" bad", " good"]'):
    return f'task = "text-classification"\nmodel = "{model}"\nalgorithm = "decomfl"\n{columns}\n{more}'


@pytest.mark.thorough
def test_a_language_model_is_trained_by_a_server_without_rows_and_clients_with_training_rows_alone(tmp_path, model):
    study, folders = study_of(tmp_path, text(model)), {}
    for number in range(CLIENTS):
        folders[number] = tmp_path / f"client{number}"
        # Their longest prompts differ, and so do the widths of their arrays.
        write_rows(folders[number], reviews(12 + 20 * number), "train")
    transport = network.InProcess(
        {number: client(number, data_dir=own, model=str(model)) for number, own in folders.items()}
    )
    result = run_study(study, transport, out=tmp_path / "run", say=lambda line: None)
    assert result.attendance["reported"] == 2 * CLIENTS
    last = result.metrics[-1].metrics
    assert set(last) == {"accuracy", "loss"}
    assert 0 <= last["accuracy"] <= 1
    assert np.isfinite(last["loss"])
    params, _ = fed.replay(result.initial_params, experiment_of(study).algorithm, result.records)
    assert fed.fingerprint(params) == fed.fingerprint(result.params)


def test_a_server_that_evaluates_reads_the_test_rows_alone(tmp_path, model):
    rows = tmp_path / "rows"
    write_rows(rows, reviews(6), "validation")
    study = study_of(tmp_path, text(model, f'data_dir = "{rows}"'), held_out=0)
    task = experiment_of(study).task
    assert (len(task.test["label"]), len(task.train["label"])) == (6, 2)
    assert task.train["label"].tolist() == [0, 1]
    (rows / "validation.jsonl").unlink()
    write_rows(rows, reviews(6), "train")
    with pytest.raises(ParameterError, match="must hold a file validation"):
        experiment_of(study)


def test_a_rate_is_not_searched_for_on_the_server(tmp_path):
    study = study_of(tmp_path, 'algorithm = "decomfl"\nlearning_rate = "auto"')
    with pytest.raises(ParameterError, match="cannot be auto over a network"):
        experiment_of(study)


def test_text_comes_from_files(model):
    settings = resolve(Single, {"task": "text-classification"}).settings(
        {"task": "text-classification", "model": str(model), "template": "{text}", "verbalizer": (" bad", " good")}
    )
    about = about_of(settings, load(settings.algorithm))
    with pytest.raises(ParameterError, match="reads text: join with --data-dir"):
        builder(Join(server="host:1", data="tokens.npz"))(about)


def test_scores_of_texts_are_not_means_of_tokens(model, tmp_path):
    with pytest.raises(ParameterError, match="whose rougeL is not a mean over examples"):
        network.parts_of(
            experiment_of(study_of(tmp_path, f'task = "xsum"\nmodel = "{model}"\nalgorithm = "decomfl"')), SHARE
        )
