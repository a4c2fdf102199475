"""Invalid parameters of the library are refused by their names."""

import dataclasses
import pickle

import numpy as np
import pytest

import hiso_jax
from hiso_jax import algorithms, fed, zo
from hiso_jax.checks import first_line
from hiso_jax.fed.task_checks import check_examples
from hiso_jax.reports.tuning import verdict
from hiso_jax.tasks.text.tasks import text_data
from tests.fed.problems import digits_population, linear_task
from tests.fed.test_sweep import made_up


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: algorithms.r_adazo(0.1, eps=0.0), "eps must be a positive finite number, got 0.0"),
        (lambda: algorithms.just_one_byte(0.1, sampler="nope"), "sampler must be one of gaussian"),
        (lambda: algorithms.fed_kseed(0.1, sampler="nope"), "sampler must be one of gaussian"),
        (lambda: zo.Pool(0), "seeds must be at least 1, got 0"),
        (lambda: fed.client_metrics(linear_task(), {}, digits_population(), most=0), "most must be at least 1, got 0"),
        (lambda: text_data("sst2", train_rows=0), "train_rows must be at least 1, got 0"),
        (lambda: text_data("squad", test_rows=-1), "test_rows must be at least 1, got -1"),
    ],
)
def test_what_cannot_be_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("given", [3, "print", fed.Callback, [hiso_jax.progress]])
def test_only_callbacks_and_functions_are_called(given):
    config = fed.SimulationConfig(cohort=2)
    with pytest.raises(hiso_jax.ParameterError, match=r"callbacks must be of fed\.Callback, or functions of a session"):
        fed.Simulation(linear_task(), hiso_jax.hiso(0.1), digits_population(), config, callbacks=given)


def test_what_is_no_part_of_the_message_path_is_refused_with_what_is():
    def doubled(messages, senders, key):
        return messages

    with pytest.raises(hiso_jax.ParameterError, match=r"send must be of fed.Send, like fed.Send\(function\); got"):
        fed.Algorithm(hiso_jax.decomfl(0.1), send=(doubled,))
    with pytest.raises(hiso_jax.ParameterError, match=r"combine must be of fed.Combine, like fed.Combine\(function\)"):
        fed.Algorithm(hiso_jax.decomfl(0.1), combine=doubled)
    with pytest.raises(hiso_jax.ParameterError, match="noise must be None for a combiner with a memory"):
        fed.Combine(doubled, separable=True, noise=fed.Noise(1.0, 1.0))


def test_what_is_no_method_is_told_what_one_is():
    config = fed.SimulationConfig(rounds=1, cohort=2)
    with pytest.raises(ValueError, match=r"tx must be an optax transformation or a fed.Algorithm, .* got a str"):
        hiso_jax.Simulation(linear_task(), "hiso", digits_population(), config)


def test_an_error_that_says_nothing_is_told_by_its_name():
    assert first_line(NotImplementedError()) == "NotImplementedError"
    assert first_line(ValueError("one\ntwo")) == "one"


def test_a_large_number_is_finite_in_double_precision_only(x64):
    data = {"input": np.array([1.0, 1e300])}
    check_examples("train", data)
    with pytest.raises(ValueError, match="must hold finite numbers only; example 1"):
        check_examples("train", {"input": data["input"] * 1e300})


def test_an_interrupted_sweep_names_no_best():
    result = dataclasses.replace(made_up([[[0.1, 0.5, 0.9, 0.9, 0.9]] * 3]), interrupted=True)
    assert verdict("hiso", result, 0.8) == "hiso: interrupted, so no best rate is reported"


def test_a_refusal_names_its_parameter_and_survives_pickling():
    with pytest.raises(hiso_jax.ParameterError) as refused:
        fed.SimulationConfig(rounds=0)
    for error in (refused.value, pickle.loads(pickle.dumps(refused.value))):
        assert (error.parameter, error.message) == ("rounds", "must be at least 1, got 0")
        assert str(error) == "rounds must be at least 1, got 0"
    assert isinstance(refused.value, ValueError)
