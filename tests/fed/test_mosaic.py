"""Mosaic and its parts in whole rounds: compared with NumPy and DeComFL, and replayed from the sent messages."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax
from hiso_jax import algorithms, channels, fed, zo
from hiso_jax.channels.clip_to_median import clipping_factors
from hiso_jax.fed.ledger import delta_of, load_delta, save_delta
from tests.callbacks import StopAt
from tests.fed.problems import assert_trees_identical, digits_population, linear_task
from tests.marks import slow

CLIENTS, MU = 5, 1e-3


def run(algorithm, task=None, participation=None, **settings):
    small = {"rounds": 4, "cohort": CLIENTS, "perturbations": 6, "batch_size": 8, "eval_every": 4, "mu": MU}
    given = small | settings
    config = fed.SimulationConfig(**given, local_learning_rate=0.01)
    return fed.Simulation(
        task or linear_task(), algorithm, digits_population(), config, participation=participation
    ).run()


def with_loss(task, loss):
    """A task with another loss per example."""
    return SimpleNamespace(init=task.init, loss=loss, metrics=task.metrics, train=task.train, test=task.test)


# ---------------------------------------------------------------- an independent implementation


def coded(g, bits):
    """One client's scalars, decoded after the wire."""
    if bits == 32:
        return g
    step = {
        1: 2 * np.abs(g).mean(),
        2: 0.996 * np.sqrt((g**2).mean()),
        4: np.abs(g).max() / 7.5,
        8: np.abs(g).max() / 127.5,
    }[bits]
    return (np.clip(np.floor(g / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5) * step


def read(losses, x, direction, *, steps, perturbations, groups, bits, rate, local_rate, weights):
    """One round by the formulas, from losses(i, k, x) and direction(k, g·P + p); returns x after the round."""
    g = np.zeros((len(weights), steps, perturbations))
    for i in range(len(weights)):
        own = x.copy()
        for k in range(steps):
            z = [direction(k, (i % groups) * perturbations + p) for p in range(perturbations)]
            g[i, k] = [(losses(i, k, own + MU * u) - losses(i, k, own)) / MU for u in z]
            own = own - local_rate * sum(number * u for number, u in zip(g[i, k], z, strict=True)) / perturbations
    sent = np.array([coded(each, bits) for each in g])
    lengths = np.sqrt((sent**2).mean((1, 2)))
    middle = np.sort(lengths)[(len(lengths) - 1) // 2]
    factor = np.minimum(1, middle / lengths)
    delta = 0.0
    for k, i, p in itertools.product(range(steps), range(len(weights)), range(perturbations)):
        share = weights[i] * factor[i] / weights.sum() / perturbations
        delta = delta + share * sent[i, k, p] * direction(k, (i % groups) * perturbations + p)
    return x - rate * delta


CASES = list(itertools.product((1, 2, 4, 8, 32), (1, 2, CLIENTS), (1, 3)))
LIGHT = [(2, 2, 3)]


def light(cases, few):
    return [case if case in few else slow(*case) for case in cases]


@pytest.mark.thorough
@pytest.mark.parametrize(("bits", "groups", "steps"), light(CASES, LIGHT))
def test_a_round_is_the_formulas(bits, groups, steps, x64):
    """A round in double precision agrees with the formulas to 1e-9."""
    rng, size, perturbations = np.random.default_rng(bits * 100 + groups), 40, 4
    targets = jnp.asarray(rng.normal(size=(CLIENTS, steps, 3, size)) * rng.uniform(0.5, 3, (CLIENTS, 1, 1, 1)))
    weights = jnp.asarray(rng.uniform(0.5, 2, CLIENTS))
    start, key = jnp.asarray(rng.normal(size=size)), jax.random.key(7)

    def loss(x, targets):
        return 0.5 * ((x - targets) ** 2).sum(-1) + jnp.sin(x).sum()

    method = hiso_jax.mosaic(0.1, scalar_bits=bits, direction_groups=groups)
    numbers = {"local_steps": steps, "num_perturbations": perturbations, "mu": MU, "local_learning_rate": 0.03}
    server_round = jax.jit(hiso_jax.make_round(loss, method, **numbers))
    state = method.tx.init(start)
    found, _, record = server_round(start, state, targets, weights, key)
    assert bool(record.valid.all())

    directions = zo.zo_state(state).directions
    made = {
        (k, q): np.asarray(zo.GroupedDirections(directions, key, k, start, None, groups, perturbations).of(q))
        for k in range(steps)
        for q in range(groups * perturbations)
    }
    host = np.asarray(targets)
    expected = read(
        lambda i, k, x: (0.5 * ((x - host[i, k]) ** 2).sum(-1) + np.sin(x).sum()).mean(),
        np.asarray(start),
        lambda k, q: made[k, q],
        steps=steps,
        perturbations=perturbations,
        groups=groups,
        bits=bits,
        rate=0.1,
        local_rate=0.03,
        weights=np.asarray(weights),
    )
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert np.abs(expected - np.asarray(start)).max() > 1e-3


# ---------------------------------------------------------------- against DeComFL


@pytest.mark.parametrize("settings", [{}, slow({"local_steps": 2})])
def test_one_group_of_floats_without_clipping_is_decomfl_to_the_bit(settings):
    method = hiso_jax.mosaic(0.05, scalar_bits=32, direction_groups="shared", clipping=False)
    ours, theirs = run(method, **settings), run(algorithms.decomfl(0.05), **settings)
    assert_trees_identical(ours.params, theirs.params)
    np.testing.assert_array_equal(ours.records.scalars, theirs.records.scalars)
    assert ours.traffic == theirs.traffic


# ---------------------------------------------------------------- replay


def rules():
    """Rules of participation with absent, dropped and late clients."""
    fleet = fed.Fleet(fed.LogNormal(0.1, 0.5), fed.LogNormal(1e6), fed.LogNormal(1e6))
    return fed.Participation(fed.Bernoulli(0.8), dropout=0.1, fleet=fleet, deadline=1.5)


@pytest.mark.parametrize(("bits", "groups", "steps"), light(CASES, [(2, CLIENTS, 1)]))
def test_what_was_sent_replays_the_run_to_the_bit(bits, groups, steps):
    """The replay is exact with kept directions, too, and with absent, late and invalid clients."""
    base = linear_task()

    def loss(params, batch):
        # A client that has an example of the class 3 in its batch has an infinite loss.
        return jnp.where(batch["label"] == 3, jnp.inf, base.loss(params, batch))

    task = with_loss(base, loss)
    method = hiso_jax.mosaic(0.05, scalar_bits=bits, direction_groups=groups)
    settings = {"local_steps": steps, "participation": rules(), "rounds": 6, "eval_every": 6}
    result = run(method, task, **settings)
    invalid = (result.records.attendance == fed.population.REPORTED) & ~result.records.valid
    assert invalid.any()
    assert result.records.valid.any()
    assert_trees_identical((result.params, result.state), fed.replay(result.initial_params, method, result.records))
    if steps == 1:
        kept = run(method, task, directions="keep", **settings)
        assert_trees_identical((kept.params, kept.records[1:]), (result.params, result.records[1:]))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "options",
    [
        {"aggregate_bits": 4},
        slow({"aggregate_bits": 8, "direction_groups": "own", "relay": "aggregate"}),
    ],
)
def test_a_rounded_aggregate_is_what_the_server_applies(options):
    method = hiso_jax.mosaic(0.05, scalar_bits=4, **({"direction_groups": "shared"} | options))
    result = run(method)
    assert result.records.aggregate.bits == options["aggregate_bits"]
    assert_trees_identical((result.params, result.state), fed.replay(result.initial_params, method, result.records))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hiso", "zo_adam"])
def test_every_method_with_scalars_can_have_groups_and_few_bits(method):
    options = {"direction_groups": 2, "scalar_bits": 2, "aggregate_bits": 8, "relay": "aggregate"}
    built = algorithms.load(f"{method}+median").build(0.02, options)
    result = run(built, difference="central")
    assert result.records.aggregate.codes.shape == (4, 1, 12)
    assert_trees_identical((result.params, result.state), fed.replay(result.initial_params, built, result.records))


# ---------------------------------------------------------------- the aggregate


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("groups", "relay"),
    light(list(itertools.product((2, 3), ("messages", "aggregate"))), [(3, "messages")]),
)
def test_delta_is_the_weighted_mean_of_the_clients_own(groups, relay):
    """The groups have different sizes, and one has no valid client."""
    x, key, weights = jnp.zeros(50), jax.random.key(3), jnp.array([1.0, 0.0, 2.0, 0.5, 0.0])
    targets = jax.random.normal(jax.random.key(4), (CLIENTS, 1, 2, 50))
    method = hiso_jax.mosaic(1.0, scalar_bits=4, clipping=False, direction_groups=groups, relay=relay)
    if groups == 3:
        weights = weights.at[2].set(0)
    one = hiso_jax.make_round(lambda x, t: ((x - t) ** 2).sum(-1), method, local_steps=1, num_perturbations=4, mu=MU)
    moved, _, record = jax.jit(one)(x, method.tx.init(x), targets, weights, key)
    own = zo.GroupedDirections(zo.zo_state(method.tx.init(x)).directions, key, 0, x, None, groups, 4)
    each = [
        sum(record.scalars.decoded()[i, 0, p] * own.of((i % groups) * 4 + p) for p in range(4)) / 4
        for i in range(CLIENTS)
    ]
    expected = sum(float(w) * np.asarray(delta) for w, delta in zip(weights, each, strict=True)) / float(weights.sum())
    np.testing.assert_allclose(moved, -expected, atol=1e-5)


def test_clipping_is_to_the_lower_median_of_those_that_count():
    messages = jnp.array([1.0, 2.0, 4.0, 8.0, jnp.nan])[:, None, None] * jnp.ones((5, 1, 3))
    weights = jnp.array([1.0, 0.1, 1.0, 1.0, 0.0])
    np.testing.assert_allclose(clipping_factors(messages, weights)[:4], [1, 1, 0.5, 0.25], rtol=1e-6)
    np.testing.assert_allclose(clipping_factors(messages, jnp.zeros(5)), 1)
    # In trees like the parameters, all numbers of a message count.
    tree = {"b": messages[:, 0, 0], "w": messages[:, 0]}
    np.testing.assert_allclose(clipping_factors(tree, weights)[:4], [1, 1, 0.5, 0.25], rtol=1e-6)


@pytest.mark.slow
def test_vectors_are_clipped_to_their_median_length_too():
    result = run(algorithms.load("fed_avg+clip_to_median").build(0.3, {}), rounds=40, eval_every=40)
    assert result.metrics[-1].metrics["accuracy"] > 0.6


@pytest.mark.thorough
def test_a_directions_draws_are_counted():
    """A round has P draws if directions are kept and 2·P if they are made again, however many groups there are."""
    count = []

    def sampler(key, shape, dtype):
        jax.debug.callback(lambda _: count.append(1), jax.random.key_data(key))
        return zo.rademacher(key, shape, dtype)

    tx = zo.grouped(hiso_jax.scale_by_zo(sampler=sampler), groups=None)
    method = fed.Algorithm(tx, rescale=(channels.clip_to_median(),), wire=fed.FewBits(scalar_bits=2))
    x, targets = jnp.zeros(64), jnp.ones((4, 1, 2, 64))
    for mode, draws in (("keep", 3), ("regenerate", 6)):
        count.clear()
        one = hiso_jax.make_round(
            lambda x, t: ((x - t) ** 2).sum(-1),
            method,
            local_steps=1,
            num_perturbations=3,
            mu=MU,
            execution=fed.ExecutionSettings(directions=mode),
        )
        jax.block_until_ready(jax.jit(one)(x, tx.init(x), targets, jnp.ones(4), jax.random.key(0)))
        jax.effects_barrier()
        assert len(count) == draws


# ---------------------------------------------------------------- refusals and warnings


def test_what_cannot_be_is_refused_before_the_run():
    with pytest.raises(ValueError, match="groups must be at most the clients of a round, 5, got 6"):
        run(hiso_jax.mosaic(0.1, direction_groups=6))
    with pytest.raises(ValueError, match="bytes_up must be at least 12 for 64 scalars"):
        run(hiso_jax.mosaic(0.1, bytes_up=8), perturbations=64)
    with pytest.raises(ValueError, match="few bits is for methods that send scalars"):
        dataclasses.replace(algorithms.fed_avg(0.1), wire=fed.FewBits(scalar_bits=2))
    with pytest.raises(ValueError, match=r"algorithm fed_avg\+quantise must send scalars to go through quantise"):
        algorithms.load("fed_avg+quantise").build(0.1, {})
    memory = fed.Combine(
        lambda messages, weights, key, state: (fed.mean(messages, weights), state), init=lambda messages: ()
    )
    with pytest.raises(ValueError, match="groups must be 1 for a combiner with a memory, got 5"):
        run(fed.Algorithm(zo.grouped(hiso_jax.decomfl(0.1), groups=None), combine=memory))


def test_few_bits_are_not_relayed_number_by_number():
    from hiso_jax.fed.round import Channel

    channel = Channel(hiso_jax.mosaic(0.1), fed.Senders(jnp.arange(2), jnp.arange(2)), jax.random.key(0), 2)
    with pytest.raises(ValueError, match="needs complete messages"):
        channel.relay(jnp.ones(2), jnp.ones(2), jnp.int32(0))


@pytest.mark.thorough
def test_a_common_offset_of_forward_differences_is_told():
    def curved(params, batch):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)) + 0 * linear_task().loss(params, batch)

    steep = with_loss(linear_task(), curved)
    assert run(algorithms.decomfl(1e-9), steep, perturbations=40, mu=0.05).offset > 1


@pytest.mark.slow
def test_at_a_usual_radius_digits_have_none():
    assert abs(run(algorithms.decomfl(1e-9), perturbations=40).offset) < 0.3


# ---------------------------------------------------------------- storage


@pytest.mark.thorough
@pytest.mark.parametrize("options", [{}, slow({"relay": "aggregate", "aggregate_bits": 4})])
def test_a_run_that_is_kept_goes_on_and_becomes_a_delta(options, tmp_path):
    """Codes are packed on disk; a stopped run ends in the same bits, and its delta leads to them, too."""
    method = hiso_jax.mosaic(0.05, scalar_bits=2, **options)
    config = fed.SimulationConfig(
        rounds=6, cohort=CLIENTS, perturbations=7, batch_size=8, eval_every=3, rounds_per_dispatch=3
    )

    def simulation(folder, **more):
        storage = fed.Storage(folder, snapshot_every=0, **more)
        return fed.Simulation(linear_task(), method, digits_population(), config, storage=storage)

    whole = simulation(tmp_path / "whole").run()
    stopped = simulation(tmp_path / "run")
    stopped.callbacks = (StopAt(3),)
    assert stopped.run().interrupted
    resumed = simulation(tmp_path / "run", resume=True).run()
    assert_trees_identical((resumed.params, resumed.records[1:]), (whole.params, whole.records[1:]))
    assert (resumed.traffic, resumed.offset) == (whole.traffic, whole.offset)

    ledger = fed.load(tmp_path / "run")
    assert ledger.rows["scalars.codes"].shape == (6, CLIENTS, 2)
    save_delta(delta_of(ledger), tmp_path / "delta.safetensors")
    updates = load_delta(tmp_path / "delta.safetensors").updates
    assert_trees_identical(updates[1:], whole.records.updates[1:])
    assert_trees_identical(fed.replay(whole.initial_params, method, updates)[0], whole.params)


@pytest.mark.thorough
@pytest.mark.parametrize("options", [{"scalar_bits": 4}, {"bytes_up": 20, "aggregate_bits": 8}])
def test_several_numbers_a_direction_go_in_few_bits_behind_the_guard(options):
    algorithm = algorithms.load("hizoo").build(1e-3, options)
    assert algorithm.rescale
    config = fed.SimulationConfig(rounds=4, cohort=6, eval_every=4, perturbations=2, batch_size=4)
    result = fed.Simulation(linear_task(), algorithm, digits_population(), config).run()
    params, _ = fed.replay(result.initial_params, algorithm, result.records)
    assert fed.fingerprint(params) == fed.fingerprint(result.params)
