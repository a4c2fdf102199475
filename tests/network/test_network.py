"""A federation over a transport: the bits of the simulation, and what strangers, absences and lost disks do to it."""

import functools
import os
import struct
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hiso_jax
from hiso_jax import fed, network
from hiso_jax.cli.main import main as command
from hiso_jax.fed.population import ABSENT, DROPPED, LATE, REPORTED
from hiso_jax.network.client_files import SECRET, STATE
from hiso_jax.network.description import run_of
from hiso_jax.network.envelope import CHECKSUM_BYTES, HEAD, Envelope, Kind, opened, sealed
from tests.fed.problems import assert_trees_identical, digits_population, linear_task
from tests.marks import thorough
from tests.network import kills
from tests.network.kills import Sockets

CLIENTS = 4


def config(rounds=6, **changes):
    given = {
        "rounds": rounds,
        "cohort": CLIENTS,
        "batch_size": 8,
        "eval_every": 2,
        "memory_budget": 1,
        "perturbations": 16,
        **changes,
    }
    return fed.SimulationConfig(**given)


@functools.cache
def parts(rounds=6):
    return network.parts(linear_task(), hiso_jax.mosaic(0.6), config(rounds))


def data_of(client):
    population, train = digits_population(CLIENTS), linear_task().train
    rows = np.asarray(population.indices)[population.offsets[client] : population.offsets[client + 1]]
    return {name: np.asarray(column)[rows] for name, column in train.items()}


def make_clients(made, folder=None):
    return {
        number: network.Client(folder and folder / str(number), data_of(number), lambda about: made, number)
        for number in range(CLIENTS)
    }


def served(made, clients, transport=network.InProcess, **given):
    notices = []
    own = transport(clients)
    result = network.Server(made, own, clients=CLIENTS, notify=notices.append, **given).run()
    return result, notices


@pytest.fixture(scope="module")
def undisturbed():
    result, _ = served(parts(), make_clients(parts()))
    return result


@pytest.mark.parametrize("name", ["mosaic", "local_mosaic", thorough("decomfl")])
def test_a_network_in_process_has_the_bits_of_a_simulation_that_takes_clients_one_by_one(name):
    method = {
        "mosaic": lambda: hiso_jax.mosaic(0.6),
        "local_mosaic": lambda: hiso_jax.local_mosaic(6.0),
        "decomfl": lambda: hiso_jax.decomfl(0.03),
    }[name]()
    own = config(local_learning_rate=0.6 if name == "local_mosaic" else None)
    made = network.parts(linear_task(), method, own)
    result, _ = served(made, make_clients(made))
    expected = fed.Simulation(linear_task(), method, digits_population(CLIENTS), own).run()
    assert_trees_identical(result.params, expected.params)
    ours, theirs = result.records, expected.records
    for field in ("cohort", "attendance", "valid", "scalars", "aggregate", "bytes_up", "bytes_down"):
        assert_trees_identical(getattr(ours, field), getattr(theirs, field))
    assert [row.metrics for row in result.metrics] == [row.metrics for row in expected.metrics]
    replayed, _ = fed.replay(result.initial_params, method, ours)
    assert_trees_identical(replayed, result.params)


class Tampering(network.InProcess):
    """Alters answers on their way to the server; ``rule(client, answer, number of its answers so far)``."""

    rule = staticmethod(lambda client, answer, count: answer)

    def exchange(self, outbox, until):
        counts = getattr(self, "counts", {})
        for client, answer in super().exchange(outbox, until):
            counts[client] = counts.get(client, 0) + 1
            altered = self.rule(client, answer, counts[client])
            for each in altered if isinstance(altered, list) else [altered]:
                if each is not None:
                    yield client, each
        self.counts = counts


def test_messages_that_do_not_come_in_time_are_late_and_the_others_count(undisturbed):
    class Silent(Tampering):
        @staticmethod
        def rule(client, answer, count):
            return None if client == 2 and opened(answer).kind is Kind.ANSWER else answer

    result, _ = served(parts(), make_clients(parts()), Silent)
    assert (result.records.attendance[result.records.cohort == 2] == LATE).all()
    assert (result.records.attendance[result.records.cohort != 2] == REPORTED).all()
    assert not result.records.valid[result.records.cohort == 2].any()
    assert np.isfinite(result.metrics[-1].metrics["loss"])


def test_clients_that_are_offline_are_absent_and_come_back(undisturbed):
    class Away(network.InProcess):
        rounds = 0

        def online(self):
            return super().online() - ({1} if 2 <= self.rounds < 4 else set())

        def exchange(self, outbox, until):
            if any(opened(message).kind is Kind.INVITE for message in outbox.values()):
                self.rounds += 1
            yield from super().exchange(outbox, until)

    result, _ = served(parts(), make_clients(parts()), Away)
    absent = (result.records.attendance == ABSENT) & (result.records.cohort == 1)
    assert absent.any(1).tolist() == [False, False, True, True, False, False]
    assert (result.records.attendance[~absent] == REPORTED).all()
    replayed, _ = fed.replay(result.initial_params, parts().algorithm, result.records)
    assert_trees_identical(replayed, result.params)


HOSTILE = {
    "truncated": lambda answer, draw: answer[: draw % len(answer)],
    "extended": lambda answer, draw: answer + bytes([draw % 256]),
    "a flipped bit": lambda answer, draw: _flipped(answer, draw),
    "another round": lambda answer, draw: _changed(answer, round=1000 + draw),
    "another run": lambda answer, draw: _changed(answer, run=draw.to_bytes(8, "little")),
    "another place": lambda answer, draw: _changed(answer, place=(opened(answer).place + 1 + draw % 60_000) % 2**16),
    "another client": lambda answer, draw: _changed(answer, client=10 + draw),
    "another kind": lambda answer, draw: _changed(answer, kind=(Kind.DESCRIBE, Kind.INVITE)[draw % 2]),
    "another version": lambda answer, draw: b"HSO2" + answer[4:],
    "no content": lambda answer, draw: _changed(answer, content=b""),
    "longer content": lambda answer, draw: _changed(answer, content=opened(answer).content + bytes(draw % 90 + 1)),
    "noise": lambda answer, draw: np.random.default_rng(draw).bytes(draw % 200),
    "NaN": lambda answer, draw: _step(answer, np.nan),
    "an infinite step": lambda answer, draw: _step(answer, np.inf),
    "a negative step": lambda answer, draw: _step(answer, -1.0),
    "an infinite loss": lambda answer, draw: _loss(answer, np.inf),
    "no loss": lambda answer, draw: _loss(answer, np.nan),
}
# Well-formed answers of a client whose numbers are not finite: it reports, and does not count.
INVALID = ("NaN", "an infinite step", "a negative step", "an infinite loss", "no loss")


PLAIN = ("truncated", "a flipped bit", "another round", "another place", "NaN", "no loss")


def _flipped(answer, draw):
    altered = bytearray(answer)
    altered[draw // 8 % len(altered)] ^= 1 << draw % 8
    return bytes(altered)


def _changed(answer, **changes):
    return sealed(opened(answer)._replace(**changes))


def _loss(answer, value):
    content = opened(answer).content
    return _changed(answer, content=struct.pack("<f", value) + content[4:])


def _step(answer, value):
    content = opened(answer).content
    return _changed(answer, content=content[:4] + struct.pack("<f", value) + content[8:])


@functools.cache
def kept_clients():
    return make_clients(parts(2))


@functools.cache
def without_client(number):
    """The run in which a client's answers never come."""

    class Silent(Tampering):
        @staticmethod
        def rule(client, answer, count):
            return None if client == number and opened(answer).kind is Kind.ANSWER else answer

    return served(parts(2), kept_clients(), Silent)[0]


@pytest.mark.parametrize("kind", [kind if kind in PLAIN else thorough(kind) for kind in HOSTILE])
@settings(max_examples=3, deadline=None, derandomize=True)
@given(draw=st.integers(0, 2**20))
def test_a_hostile_answer_changes_nothing_but_its_own_row(kind, draw):
    class Hostile(Tampering):
        @staticmethod
        def rule(client, answer, count):
            return HOSTILE[kind](answer, draw) if client == 3 and opened(answer).kind is Kind.ANSWER else answer

    # The clients of earlier examples: they stand ahead of a server that begins anew, which sends them its start.
    result, _ = served(parts(2), kept_clients(), Hostile)
    own = result.records.cohort == 3
    status = result.records.attendance[own]
    if kind in INVALID:
        assert (status == REPORTED).all()
    else:
        assert np.isin(status, (DROPPED, LATE)).all()
    assert not result.records.valid[own].any()
    assert (result.records.attendance[~own] == REPORTED).all()
    assert_trees_identical(result.params, without_client(3).params)


def test_of_two_answers_the_first_counts(undisturbed):
    class Twice(Tampering):
        @staticmethod
        def rule(client, answer, count):
            if opened(answer).kind is not Kind.ANSWER:
                return answer
            return [answer, _step(answer, 1e3), answer]

    result, _ = served(parts(), make_clients(parts()), Twice)
    assert_trees_identical(result.params, undisturbed.params)


def test_who_lost_its_disk_or_has_a_torn_file_is_caught_up(tmp_path, undisturbed):
    """A server begins anew: one client is ahead of it, one lost its disk, one file is torn, one client is as it was."""
    made = parts()
    first = make_clients(made, tmp_path)
    result, _ = served(parts(3), first)
    assert result.rounds == 3
    for client in first.values():
        client.save()
    ahead = first[0]
    (tmp_path / "1" / STATE).unlink()
    torn = tmp_path / "2" / STATE
    torn.write_bytes(torn.read_bytes()[:-40])
    again = {0: ahead, **{number: client for number, client in make_clients(made, tmp_path).items() if number}}
    # A server that begins anew: client 0 stands at round 2 of the same history, client 3 finds its file.
    result, _ = served(made, again)
    assert_trees_identical(result.params, undisturbed.params)


def test_a_server_goes_on_from_its_ledger_and_clients_where_they_stand(tmp_path, undisturbed):
    made, clients = parts(), make_clients(parts())
    server = network.Server(made, network.InProcess(clients), clients=CLIENTS, storage=tmp_path / "run")

    class Stop(fed.Callback):
        def after(self, session, evaluation):
            if session.round == 2:
                server.stop()

    server._run._callbacks = (Stop(),)
    assert server.run().rounds == 2
    # One of them is new.
    clients[3] = make_clients(made)[3]
    storage = fed.Storage(tmp_path / "run", resume=True)
    result = network.Server(made, network.InProcess(clients), clients=CLIENTS, storage=storage).run()
    assert_trees_identical(result.params, undisturbed.params)
    assert fed.load(tmp_path / "run").seal["params_sha256"] == fed.fingerprint(result.params)


def test_what_a_client_refuses_is_said_in_one_sentence():
    client = make_clients(parts())[0]
    assert opened(client.answer(b"")).content.startswith(b"a message has at least")
    envelope = opened(client.answer(b"x" * 99))
    assert envelope.kind is Kind.REFUSED
    hello = network.parts(linear_task(), hiso_jax.decomfl(0.1), config())
    other = hello.description(hello.initial())
    asked = sealed(Envelope(Kind.DESCRIBE, run_of(other), 0, 0, 0, other))
    assert b"its method is another" in opened(client.answer(asked)).content
    wrong = sealed(Envelope(Kind.DESCRIBE, run_of(other), 0, 2, 0, other))
    assert b"this is client 0" in opened(client.answer(wrong)).content


@settings(max_examples=60, deadline=None, derandomize=True)
@given(noise=st.binary(max_size=400), place=st.integers(0, 2**31), kind=st.sampled_from(sorted(Kind)))
def test_nothing_that_a_client_is_sent_raises_or_moves_it(noise, place, kind):
    client = _warm_client()
    before = client.standing
    envelope = opened(_invitation())
    for message in (
        noise,
        _flipped(_invitation(), place),
        sealed(envelope._replace(kind=kind, content=noise)),
        sealed(envelope._replace(content=envelope.content[: place % len(envelope.content)])),
        sealed(envelope._replace(content=envelope.content + noise)) if noise else noise,
    ):
        answer = opened(client.answer(message))
        assert answer.kind in (Kind.REFUSED, Kind.STANDS)
    assert client.standing is before


@functools.cache
def _warm_client():
    clients = make_clients(parts())
    _sent.clear()

    class Watching(Tampering):
        def exchange(self, outbox, until):
            _sent.extend(
                m for c, m in outbox.items() if c == 0 and opened(m).kind is Kind.INVITE and opened(m).round > 2
            )
            yield from super().exchange(outbox, until)

    served(parts(3), clients, Watching)
    # An invitation to a later round than it stands at, which it has not seen.
    served(parts(), {**clients, 0: make_clients(parts())[0]}, Watching)
    return clients[0]


_sent: list[bytes] = []


def _invitation():
    _warm_client()
    return _sent[0]


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (hiso_jax.fed_avg(0.1), "algorithm must send scalars over a network; Flower"),
        (
            optax.chain(hiso_jax.scale_by_zo(), optax.contrib.reduce_on_plateau(), optax.scale_by_learning_rate(0.1)),
            "algorithm must not read the loss",
        ),
    ],
)
def test_methods_that_do_not_suit_are_refused(method, sentence):
    made = network.parts(linear_task(), method, config())
    with pytest.raises(hiso_jax.ParameterError, match=sentence):
        network.Server(made, network.InProcess({}), clients=CLIENTS)


def test_a_message_is_its_scalars_and_a_known_envelope():
    sizes = []

    class Weighing(Tampering):
        @staticmethod
        def rule(client, answer, count):
            if opened(answer).kind is Kind.ANSWER:
                sizes.append(len(answer))
            return answer

    served(parts(2), make_clients(parts(2)), Weighing)
    # The step and 16 codes of 8 bits as in ``traffic``, the loss, the header and the checksum.
    assert {*sizes} == {HEAD.size + 4 + 4 + 16 + CHECKSUM_BYTES}
    assert len(sizes) == 2 * CLIENTS


STUDY = 'algorithm = "mosaic"\nrounds = 2\ncohort = 2\n{more}\n[network]\nclients = 2\n{own}\n'


@pytest.mark.parametrize(
    ("more", "own", "sentence"),
    [
        ("alpha = 0.1", "", "alpha only simulates; over a network clients are as they are"),
        ('attack = "sign_flip"', "", "attack only simulates"),
        ("dropout = 0.5", "", "dropout only simulates"),
        ("round = 3", "", "round is no option of an experiment; did you mean rounds?"),
        ("", "deadlin = 3", "deadlin is no entry of [network]; did you mean deadline?"),
        ("", "deadline = -1", "deadline must be a positive finite number"),
        ("", "quorum = 3", "quorum must be at most the number of clients, 2, got 3"),
        ("cohort = 2", "", "study must be TOML"),
        (
            'combine = "private_mean"\nnoise_multiplier = 1.0\nlearning_rate = 0.1',
            "",
            "public_cohorts must be true over a network",
        ),
    ],
)
def test_a_study_that_cannot_be_served_is_refused_in_one_line(tmp_path, capsys, more, own, sentence):
    study = tmp_path / "study.toml"
    study.write_text(STUDY.format(more=more, own=own))
    with pytest.raises(SystemExit) as ended:
        command(["serve", str(study), "--dry-run", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_method_that_sends_vectors_is_not_served(tmp_path, capsys):
    study = tmp_path / "study.toml"
    study.write_text(STUDY.format(more="", own="").replace("mosaic", "fed_avg"))
    with pytest.raises(SystemExit):
        command(["serve", str(study), "--dry-run"])
    assert "algorithm must send scalars over a network; Flower and others" in capsys.readouterr().err


def test_a_dry_run_writes_a_directory_that_replays(tmp_path, capsys):
    study = tmp_path / "study.toml"
    study.write_text(STUDY.format(more="eval_every = 1", own=""))
    for words in (["serve", study, "--dry-run", "--out", tmp_path / "run"], ["replay", tmp_path / "run"]):
        with pytest.raises(SystemExit) as ended:
            command([str(word) for word in words])
        assert ended.value.code == 0
    assert "equal to the run's, bit for bit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere", "--data", "none.npz"], "server must be HOST:PORT, got nowhere"),
        (["h:1", "--data", "none.npz"], "--data must be an .npz file of arrays or FILE.py:FUNCTION; none.npz"),
        (["h:1", "--data", "none.py:f"], "--data must name a Python file, none.py is none"),
    ],
)
def test_data_that_cannot_be_read_are_refused_in_one_line(tmp_path, capsys, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command(["join", *words])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert sentence in said
    assert said.count("\n") == 1


class _Beside(network.InProcess):
    """Clients in this process, and one in a process of its own."""

    def __init__(self, clients, folder):
        super().__init__(clients)
        self._there = Sockets(folder)

    def online(self):
        return {0, 1, 2}

    def exchange(self, outbox, until):
        while outbox:
            there = {client: outbox.pop(client) for client in [*outbox] if client == 2}
            yield from self._there.exchange(there, until)
            yield from super().exchange(outbox, until)


@pytest.mark.thorough
def test_a_client_whose_processor_has_other_last_bits_takes_part(tmp_path):
    rounds, told = 12, []
    made = kills.parts(rounds)
    flags = {"XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2", "HISO_JAX_CACHE": "off", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    words = ["--role", "client", "--client", "2", "--folder", str(tmp_path), "--rounds", str(rounds)]
    other = subprocess.Popen([sys.executable, "-m", "tests.network.kills", *words], env={**os.environ, **flags})
    try:
        here = {number: network.Client(None, kills.data_of(number), lambda about: made, number) for number in (0, 1)}
        settings = network.NetworkSettings(check_every=3, deadline=120.0)
        server = network.Server(made, _Beside(here, tmp_path), clients=3, network=settings, notify=told.append)
        result = server.run()
    finally:
        other.kill()
    assert (result.records.attendance == REPORTED).all()
    assert any("client 2 computes other last bits" in line for line in told), told
    replayed, _ = fed.replay(result.initial_params, made.algorithm, result.records)
    assert_trees_identical(replayed, result.params)


@pytest.mark.thorough
def test_kills_of_clients_and_the_server_change_nothing():
    found = kills.drive(6, 150, 1)
    assert found["kills"] == 6
    assert not found["answers missing"]
    assert found["equal"]


def test_a_private_answer_has_no_loss_and_the_noise_is_of_the_clients_own_secret(tmp_path):
    own = hiso_jax.Experiment(
        algorithm="decomfl+local_noise", noise_multiplier=0.5, rounds=2, cohort=2, clients=2, eval_every=2,
        batch_size=8, learning_rate=0.01,
    )  # fmt: skip
    made, sizes = network.parts_of(own), []

    class Weighing(Tampering):
        @staticmethod
        def rule(client, answer, count):
            if opened(answer).kind is Kind.ANSWER:
                sizes.append(len(opened(answer).content))
            return answer

    def run(folder):
        clients = {n: network.Client(folder and folder / str(n), data_of(n), lambda about: made, n) for n in (0, 1)}
        return network.Server(made, Weighing(clients), clients=2).run()

    first, again = run(tmp_path), run(None)
    # Five float32 scalars, and nothing else.
    assert {*sizes} == {20}
    assert np.isnan(first.records.loss).all()
    # Other secrets, other noise: the description and the seed do not tell it.
    assert (np.asarray(first.records.scalars) != np.asarray(again.records.scalars)).all()
    assert {(tmp_path / str(n) / SECRET).stat().st_mode & 0o777 for n in (0, 1)} == {0o600}
    replayed, _ = fed.replay(first.initial_params, made.algorithm, first.records)
    assert_trees_identical(replayed, first.params)


def test_a_client_whose_parameters_are_far_is_sent_a_checkpoint(undisturbed):
    clients, told = make_clients(parts()), []

    class Astray(network.InProcess):
        """Moves the parameters of client 1 before round 2, as a fault of its memory would."""

        def exchange(self, outbox, until):
            invited = {opened(message).round for message in outbox.values() if opened(message).kind is Kind.INVITE}
            if invited == {2}:
                run = clients[1]._run
                run.standing = run.standing._replace(params=jax.tree.map(lambda x: x + 1, run.standing.params))
            yield from super().exchange(outbox, until)

    settings = network.NetworkSettings(check_every=2)
    result = network.Server(parts(), Astray(clients), clients=CLIENTS, network=settings, notify=told.append).run()
    assert any("client 1 has other parameters; it is sent a checkpoint" in line for line in told)
    assert (result.records.attendance == REPORTED).all()
    assert_trees_identical(result.params, undisturbed.params)
