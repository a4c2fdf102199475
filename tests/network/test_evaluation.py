"""Clients evaluate on examples that they hold out, and send sums and counts."""

import struct

import jax
import numpy as np
import pytest

import hiso_jax
from hiso_jax import fed, network
from hiso_jax.checks import ParameterError
from hiso_jax.network.client import _split
from hiso_jax.network.envelope import Kind, opened, sealed
from hiso_jax.network.study import read_study
from hiso_jax.reports import Report
from tests.fed.problems import linear_task
from tests.network.test_network import CLIENTS, config, data_of, make_clients, served

SHARE = 0.25


def parts(rounds=4):
    return network.parts(linear_task(), hiso_jax.mosaic(0.6), config(rounds), held_out=SHARE)


def by_hand(params):
    """The means over all examples held out, and their number."""
    held_out = [_split(data_of(client), SHARE)[1] for client in range(CLIENTS)]
    whole = jax.tree.map(lambda *columns: np.concatenate(columns), *held_out)
    metrics = linear_task().metrics(params, whole)
    return {name: float(np.mean(np.asarray(values, np.float64))) for name, values in metrics.items()}


class Altered(network.InProcess):
    """Clients whose answers to evaluations are changed on their way, or do not come."""

    change = staticmethod(lambda client, envelope: envelope)

    def exchange(self, outbox, until):
        for client, message in super().exchange(outbox, until):
            envelope = opened(message)
            if envelope.kind is Kind.METRICS:
                envelope = self.change(client, envelope)
                if envelope is None:
                    continue
            yield client, sealed(envelope)


def test_the_metrics_are_means_over_all_examples_held_out():
    made = parts()
    result, notices = served(made, make_clients(made))
    assert [row.round for row in result.metrics] == [0, 2, 4]
    first, last = by_hand(result.initial_params), by_hand(result.params)
    for name, value in last.items():
        assert result.metrics[-1].metrics[name] == pytest.approx(value, rel=1e-5)
        assert result.metrics[0].metrics[name] == pytest.approx(first[name], rel=1e-5)
    assert result.metrics[-1].metrics["loss"] < result.metrics[0].metrics["loss"]
    assert not [line for line in notices if "left out" in line]


def test_examples_held_out_are_not_trained_on():
    train, held_out = _split(data_of(0), SHARE)
    count = len(data_of(0)["label"])
    assert len(held_out["label"]) == round(SHARE * count)
    assert len(train["label"]) + len(held_out["label"]) == count
    rows = {row.tobytes() for row in data_of(0)["input"]}
    parts_of_it = [{row.tobytes() for row in part["input"]} for part in (train, held_out)]
    assert parts_of_it[0] | parts_of_it[1] == rows
    made = parts()
    own = make_clients(made)
    served(made, own)
    assert {own[0]._run.examples} == {len(train["label"])}


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_at_least_one_example_is_on_each_side(share):
    two = {"label": np.arange(2)}
    assert [len(part["label"]) for part in _split(two, share)] == [1, 1]
    with pytest.raises(ParameterError, match="two examples or more"):
        _split({"label": np.arange(1)}, share)


COUNT = struct.Struct("<I")
FORGED = {
    "no examples": lambda content: COUNT.pack(0) + content[4:],
    "too many examples": lambda content: COUNT.pack(2**31) + content[4:],
    "not finite": lambda content: content[:4] + struct.pack("<d", np.inf) + content[12:],
    "longer": lambda content: content + b"\0",
    "shorter": lambda content: content[:-1],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_answer_is_left_out(name):
    class Forging(Altered):
        change = staticmethod(
            lambda client, envelope: envelope if client else envelope._replace(content=FORGED[name](envelope.content))
        )

    made = parts(2)
    result, notices = served(made, make_clients(made), Forging)
    assert any("client 0 is left out: its sums" in line for line in notices)
    assert np.isfinite(result.metrics[-1].metrics["loss"])
    assert result.attendance["reported"] == 2 * CLIENTS


def test_an_evaluation_that_nobody_answers_has_no_metrics(tmp_path):
    class Silent(Altered):
        change = staticmethod(lambda client, envelope: None)

    made = parts(2)
    files = {"storage": tmp_path / "run", "callbacks": (Report(),)}
    result, notices = served(made, make_clients(made), Silent, network=network.NetworkSettings(deadline=0.2), **files)
    assert np.isnan(result.metrics[-1].metrics["loss"])
    assert any("no client answered in time" in line for line in notices)
    assert result.rounds == 2
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000


def test_a_run_that_evaluates_on_clients_goes_on(tmp_path):
    made, own = parts(4), None
    own = make_clients(made)
    whole, _ = served(made, make_clients(made), storage=tmp_path / "whole")
    served(parts(2), own, storage=tmp_path / "run")
    again, _ = served(made, own, storage=fed.Storage(tmp_path / "run", resume=True))
    assert fed.fingerprint(again.params) == fed.fingerprint(whole.params)
    assert again.metrics[-1].metrics == whole.metrics[-1].metrics


def test_a_study_says_how_much_is_held_out(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text("rounds = 2\n[network]\nclients = 4\nheld_out = 0.2\n")
    assert read_study(path).held_out == 0.2
    path.write_text("rounds = 2\n[network]\nclients = 4\nheld_out = 1.5\n")
    with pytest.raises(ParameterError, match="held_out"):
        read_study(path)


def test_private_runs_and_metrics_of_other_forms_are_refused():
    private = hiso_jax.channels.local_noise().into(hiso_jax.algorithms.decomfl(0.1))
    with pytest.raises(ParameterError, match="must be 0 in a private run"):
        network.parts(linear_task(), private, config(2, public_cohorts=True), held_out=SHARE)
