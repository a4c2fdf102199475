"""An algorithm's parts: the measure, the channels of the message path, the combiner, and its memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hiso_jax
from hiso_jax import algorithms, channels, fed, zo
from hiso_jax.fed.algorithm import by_scalar
from tests.callbacks import StopAt
from tests.fed.problems import assert_trees_identical, digits_population, linear_task
from tests.marks import slow

SETTINGS = {"rounds": 12, "cohort": 5, "batch_size": 8, "perturbations": 3, "eval_every": 4}
KEY = jax.random.key(3)


def run(algorithm, storage=None, callbacks=(), **settings):
    config = fed.SimulationConfig(**(SETTINGS | settings))
    return fed.Simulation(
        linear_task(), algorithm, digits_population(), config, storage=storage, callbacks=callbacks
    ).run()


# ---------------------------------------------------------------- channels and combiners in a round


def noisy(messages, senders, key):
    """The messages, each with its client's own noise."""
    keys = jax.vmap(lambda client: jax.random.fold_in(key, client))(senders.client_ids)
    return jax.tree.map(lambda m: m + 0.1 * jax.vmap(lambda k: jax.random.normal(k))(keys), messages)


def jittered_mean(messages, weights, key):
    return jax.tree.map(lambda m: m + 0.1 * jax.random.normal(key), fed.mean(messages, weights))


noisy, jittered_mean = fed.Send(noisy, separable=True), fed.Combine(jittered_mean, separable=True)


@fed.Send
def doubled(messages, senders, key):
    return jax.tree.map(lambda m: 2 * m, messages)


@fed.Send
def squared(messages, senders, key):
    return jax.tree.map(jnp.square, messages)


PARTS = {
    "separable, with keys": {"send": (noisy,), "combine": jittered_mean},
    "whole messages": {"send": (noisy, channels.clip(clip_norm=0.5))},
    "median": {"combine": channels.median()},
    "trimmed": {"combine": channels.trimmed_mean(trim=0.25)},
    "signs": {"send": (channels.signs(),), "combine": channels.majority()},
}


FAST = ("separable, with keys",)


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name if name in FAST else slow(name) for name in PARTS])
def test_kept_and_regenerated_directions_and_the_replay_are_the_same_to_the_bit(name):
    algorithm = fed.Algorithm(hiso_jax.hiso(0.02), **PARTS[name])
    kept, made_again = run(algorithm, directions="keep"), run(algorithm, directions="regenerate")
    np.testing.assert_array_equal(kept.records.scalars, made_again.records.scalars)
    np.testing.assert_array_equal(kept.records.aggregate, made_again.records.aggregate)
    assert_trees_identical((kept.params, kept.state), (made_again.params, made_again.state))
    assert_trees_identical((kept.params, kept.state), fed.replay(kept.initial_params, algorithm, kept.records))


def loss(params, batch):
    return ((batch @ params["w"]) ** 2).sum(1)


def one_round(algorithm, batches, mask=None, **settings):
    params = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3)}
    settings = {"local_steps": 1, "num_perturbations": 3, "mu": 1e-3} | settings
    mask = jnp.ones(len(batches), bool) if mask is None else mask
    round_ = fed.make_round(loss, algorithm, **settings)
    return jax.jit(round_)(params, algorithm.tx.init(params), batches, mask, KEY)


BATCHES = jax.random.normal(jax.random.key(1), (4, 1, 6, 4))


def test_messages_pass_the_channels_in_order_and_are_recorded_as_they_arrive():
    plain = one_round(fed.Algorithm(hiso_jax.decomfl(0.1)), BATCHES)[2]
    algorithm = fed.Algorithm(hiso_jax.decomfl(0.1), send=(doubled, squared), rescale=(channels.clip(clip_norm=1.0),))
    sent = one_round(algorithm, BATCHES)[2]
    np.testing.assert_allclose(sent.scalars, (2 * plain.scalars) ** 2, rtol=1e-5)
    # The server clips the messages that it receives.
    norms = np.linalg.norm(np.asarray(sent.scalars).reshape(4, -1), axis=1)
    assert norms.min() > 1
    np.testing.assert_allclose(sent.aggregate, (sent.scalars / norms[:, None, None]).mean(0), rtol=1e-5)
    assert sent.clipped == 4


@pytest.mark.parametrize("directions", ["keep", "regenerate"])
def test_the_sign_of_an_infinity_does_not_vote(directions):
    algorithm = algorithms.sign(0.1)
    poisoned = BATCHES.at[2].set(1e30)
    execution = fed.ExecutionSettings(directions=directions)
    record = one_round(algorithm, poisoned, execution=execution)[2]
    assert record.valid.tolist() == [True, True, False, True]
    others = one_round(algorithm, BATCHES, jnp.array([1.0, 1.0, 0.0, 1.0]), execution=execution)[2]
    np.testing.assert_array_equal(record.aggregate, others.aggregate)
    assert set(np.unique(record.aggregate)) <= {-1.0, 1.0}


def test_a_channel_may_invalidate_a_message():
    def broken(messages, senders, key):
        return jax.tree.map(lambda m: m.at[1].set(jnp.nan), messages)

    record = one_round(fed.Algorithm(hiso_jax.decomfl(0.1), send=(fed.Send(broken),)), BATCHES)[2]
    assert record.valid.tolist() == [True, False, True, True]


def test_senders_are_client_numbers_with_their_places_beside_them():
    seen = []

    def asking(messages, senders, key):
        jax.debug.callback(lambda *each: seen.append(each), senders.client_ids, senders.places)
        return messages

    result = run(fed.Algorithm(hiso_jax.decomfl(0.02), send=(fed.Send(asking),)), rounds=3, eval_every=3)
    jax.effects_barrier()
    assert {tuple(numbers.tolist()) for numbers, _ in seen} == set(map(tuple, result.records.cohort.tolist()))
    assert all(places.tolist() == [0, 1, 2, 3, 4] for _, places in seen)


def test_numbers_one_by_one_have_keys_of_their_own():
    messages = jnp.zeros((3, 2, 4))
    drawn = by_scalar(lambda column, key: jax.random.normal(key), messages, KEY)
    assert drawn.shape == (2, 4)
    assert len(np.unique(drawn)) == 8
    later = by_scalar(lambda column, key: jax.random.normal(key), messages[:, :, :1], KEY, first=2)
    np.testing.assert_array_equal(later[:, 0], drawn[:, 2])


# ---------------------------------------------------------------- a user's own measure


@dataclasses.dataclass(frozen=True)
class Seen:
    """A head's use of a second estimate: it adds the mean curvature along the directions to H."""

    def __call__(self, curvature, delta, step):
        return jax.tree.map(lambda h: h + step.aggregate["curvature"].mean(), curvature)


@pytest.mark.thorough
def test_several_numbers_a_direction_reach_the_head_and_the_ledger(tmp_path):
    head = zo.head(curvature=lambda params: jax.tree.map(jnp.ones_like, params), advance=Seen())
    algorithm = fed.Algorithm(optax.chain(head, optax.scale(-0.001)), measure=fed.probes("second"))
    result = run(algorithm, fed.Storage(tmp_path / "run"), rounds=4)
    assert set(result.records.scalars) == {"slope", "curvature"}
    assert result.records.scalars["slope"].shape == (4, 5, 1, 3)
    assert result.forward_passes == 4 * 5 * (2 * 3 + 1)
    assert result.traffic["bytes_up"] == 4 * 5 * (8 + 2 * 4 * 3)
    records = fed.load(tmp_path / "run").records
    assert_trees_identical(records[1:], result.records[1:])
    assert_trees_identical((result.params, result.state), fed.replay(result.initial_params, algorithm, records))
    means = result.records.aggregate["curvature"].mean((1, 2))
    learned = zo.zo_state(result.state).curvature["bias"]
    np.testing.assert_allclose(learned, 1 + means.sum(), rtol=1e-4)


def test_a_method_beside_a_measure_is_refused():
    algorithm = fed.Algorithm(hiso_jax.decomfl(0.1), measure=fed.probes("central"))
    with pytest.raises(ValueError, match="difference must not be given for an algorithm that has a measure of its own"):
        run(algorithm, difference="forward")
    with pytest.raises(ValueError, match="difference must not be given"):
        fed.make_round(loss, algorithm, local_steps=1, num_perturbations=1, mu=1e-3, difference="central")
    assert run(algorithm, rounds=2, eval_every=2).forward_passes == 2 * 5 * 2 * 3


# ---------------------------------------------------------------- combiners that remember


def capped(start=1.0):
    """Messages capped at a running mean of past caps."""

    def combine(messages, weights, key, state):
        size = jnp.abs(messages).mean((1, 2))
        cap = fed.mean(size, weights)
        factor = jnp.minimum(1, state["cap"] / size)[:, None, None]
        aggregate = by_scalar(lambda column, key: fed.mean(column, weights), messages * factor, key)
        return aggregate, {"cap": 0.5 * state["cap"] + 0.5 * cap, "rounds": state["rounds"] + 1}

    return fed.Combine(combine, init=lambda messages: {"cap": jnp.float32(start), "rounds": jnp.int32(0)})


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("snapshot_every", "weighting"),
    [(3, "examples"), *(slow(*case) for case in [(0, "examples"), (3, "uniform")])],
)
def test_what_a_combiner_remembers_survives_a_stop(tmp_path, snapshot_every, weighting):
    algorithm = fed.Algorithm(hiso_jax.hiso(0.02), combine=capped())
    settings = {"rounds_per_dispatch": 1, "weighting": weighting}
    whole = run(algorithm, **settings)
    storage = fed.Storage(tmp_path / "run", snapshot_every=snapshot_every)
    stopped = run(algorithm, storage, [StopAt(8)], **settings)
    assert (stopped.rounds, stopped.interrupted) == (8, True)
    assert (tmp_path / "run" / "snapshots").exists() == bool(snapshot_every)
    resumed = run(algorithm, fed.Storage(tmp_path / "run", resume=True), **settings)
    assert resumed.rounds == 12
    assert_trees_identical((resumed.params, resumed.state), (whole.params, whole.state))
    assert_trees_identical(resumed.records[1:], whole.records[1:])
    # The memory affects later rounds: a fresh memory leads to other aggregates.
    fresh = run(fed.Algorithm(hiso_jax.hiso(0.02), combine=capped(1e9)), **settings)
    assert not np.array_equal(fresh.records.aggregate, whole.records.aggregate)


def test_a_round_hands_out_what_its_combiner_remembers():
    algorithm = fed.Algorithm(hiso_jax.decomfl(0.1), combine=capped())
    params = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3)}
    state = algorithm.tx.init(params), fed.first_memory(algorithm, BATCHES)
    round_ = jax.jit(fed.make_round(loss, algorithm, local_steps=1, num_perturbations=3, mu=1e-3))
    _, (_, memory), record = round_(params, state, BATCHES, jnp.ones(4, bool), KEY)
    assert int(memory.combine["rounds"]) == 1
    np.testing.assert_allclose(memory.combine["cap"], 0.5 + 0.5 * np.abs(record.scalars).mean(), rtol=1e-5)
    _, (_, memory), _ = round_(params, state, jnp.full_like(BATCHES, jnp.nan), jnp.ones(4, bool), KEY)
    assert int(memory.combine["rounds"]) == 0


def running(decay=0.9):
    """A combiner that divides by the root mean square of past aggregates, in arithmetic without pins."""

    def combine(messages, weights, key, state):
        aggregate = fed.mean(messages, weights)
        moved = decay * state + (1 - decay) * aggregate * aggregate + 1e-3 * jax.random.normal(key, aggregate.shape)
        return aggregate / (jnp.sqrt(jnp.abs(moved)) + 1e-8), moved

    return fed.Combine(combine, init=lambda messages: jax.tree.map(lambda m: jnp.ones(m.shape[1:], m.dtype), messages))


@pytest.mark.thorough
def test_a_memory_made_again_from_the_ledger_is_the_runs_to_the_last_bit(tmp_path):
    algorithm, settings = fed.Algorithm(hiso_jax.hiso(0.02), combine=running()), {"rounds_per_dispatch": 3}
    run(
        algorithm,
        fed.Storage(tmp_path / "run", snapshot_every=0),
        [StopAt(9)],
        **settings,
    )
    resumed = run(algorithm, fed.Storage(tmp_path / "run", resume=True), **settings)
    whole = run(algorithm, **settings)
    assert_trees_identical((resumed.params, resumed.state), (whole.params, whole.state))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "other",
    [
        {"combine": channels.median()},
        slow({"measure": fed.probes("central")}),
        slow({"send": (doubled,)}),
        slow({"wire": fed.Wire(8, 8)}),
    ],
)
def test_another_algorithm_does_not_go_on_with_a_run(tmp_path, other):
    tx = hiso_jax.hiso(0.02)
    run(fed.Algorithm(tx), fed.Storage(tmp_path / "run"), [StopAt(4)])
    with pytest.raises(ValueError, match="cannot be continued: what the method measures, sends, combines or counts"):
        run(fed.Algorithm(tx, **other), fed.Storage(tmp_path / "run", resume=True))


@pytest.mark.parametrize("numbers", [lambda f, mu: (f[0], f[1]), lambda f, mu: {"a.b": f[0]}])
def test_numbers_that_the_ledger_has_no_columns_for_are_refused(numbers):
    algorithm = fed.Algorithm(hiso_jax.hiso(0.02), measure=fed.probes(zo.Difference((0.0, 1.0), numbers)))
    with pytest.raises(ValueError, match="measure must give an array, or a dict of arrays whose names have no dot"):
        run(algorithm)
