"""Cohorts in which some clients backpropagate and project, and the others measure finite differences."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax
from hiso_jax import algorithms, channels, fed, zo
from hiso_jax.checks import ParameterError
from hiso_jax.fed.ledger import delta_of, load_delta, save_delta
from hiso_jax.fed.population import REPORTED
from hiso_jax.fed.run.health_warnings import HealthWarnings
from tests.callbacks import StopAt
from tests.fed.problems import assert_trees_identical, digits_population, linear_task
from tests.fed.test_mosaic import coded
from tests.fed.test_projections import CLIENTS, LOCAL
from tests.fed.test_projections import run as run_projections
from tests.marks import slow, thorough

PROBING = np.array([True, False, True, False, False])


def lower_median(values):
    return np.sort(values)[(len(values) - 1) // 2]


@pytest.mark.parametrize(("steps", "scale"), [(5, None), slow(1, None), slow(5, 0.3)])
@pytest.mark.parametrize(("bits", "groups", "sampler"), [(1, CLIENTS, "gaussian"), slow(32, 1, "hadamard")])
def test_a_round_is_the_formulas(steps, scale, bits, groups, sampler, x64):
    """A round in double precision agrees with the formulas to 1e-9."""
    rng, count, mu = np.random.default_rng(steps), 6, 1e-3
    targets = rng.normal(size=(CLIENTS, steps, 3, 9)) * rng.uniform(0.5, 3, (CLIENTS, 1, 1, 1))
    start, key, weights = rng.normal(size=9), jax.random.key(7), rng.uniform(0.5, 2, CLIENTS)

    def loss(x, targets):
        return 0.5 * ((x - targets) ** 2).sum(-1) + jnp.sin(x).sum()

    made = hiso_jax.mosaic(0.1, scalar_bits=bits, direction_groups=groups, sampler=sampler)
    algorithm = dataclasses.replace(made, measure=fed.mixed(scale=scale))
    one = hiso_jax.make_round(
        loss, algorithm, local_steps=steps, num_perturbations=count, mu=mu, local_learning_rate=LOCAL
    )
    state = algorithm.optimizer.init(jnp.asarray(start))
    aside = fed.Aside(probing=jnp.asarray(PROBING))
    found, _, record = jax.jit(one)(
        jnp.asarray(start), state, jnp.asarray(targets), jnp.asarray(weights), key, aside=aside
    )
    directions = zo.zo_state(state).grouped_directions(
        key, 0, jnp.asarray(start), groups=groups, num_perturbations=count
    )
    z = [np.asarray(zo.made_dense(directions.of(q))) for q in range(groups * count)]
    sent = np.zeros((CLIENTS, count))
    for i in range(CLIENTS):
        own = [z[(i % groups) * count + p] for p in range(count)]
        if PROBING[i]:
            value = lambda x, i=i: (0.5 * ((x - targets[i, 0]) ** 2).sum(-1)).mean() + np.sin(x).sum()  # noqa: E731
            slopes = [(value(start + mu * u) - value(start)) / mu * (scale or 1) for u in own]
        else:
            x, total = start.copy(), 0.0
            for k in range(steps):
                gradient = x - targets[i, k].mean(0) + np.cos(x)
                x, total = x - LOCAL * gradient, total + gradient
            slopes = [(total / steps * u).sum() for u in own]
        sent[i] = coded(np.array(slopes)[None], bits)[0]
    lengths = np.sqrt((sent**2).mean(1))
    ratio = lower_median(lengths[~PROBING]) / lower_median(lengths[PROBING])
    gamma = min(ratio, 1.0) if steps > 1 and scale is None else 1.0
    sent = np.where(PROBING, gamma, 1.0)[:, None] * sent
    lengths = np.sqrt((sent**2).mean(1))
    factor = np.minimum(1, lower_median(lengths) / lengths)
    delta = sum(
        weights[i] * factor[i] / weights.sum() / count * sent[i, p] * z[(i % groups) * count + p]
        for i in range(CLIENTS)
        for p in range(count)
    )
    np.testing.assert_allclose(found, start - 0.1 * delta, atol=1e-9)
    # The factor γ on finite differences is a weight, and is not counted as clipping.
    assert int(record.clipped) == (factor < 1 - 1e-12).sum()


def test_a_short_message_does_not_lengthen_the_others_of_its_kind():
    """γ is at most 1; otherwise one tiny message of two would let the other one decide the round."""
    algorithm = hiso_jax.mosaic(0.1, scalar_bits=32, direction_groups="shared", clipping=False)
    algorithm = dataclasses.replace(algorithm, measure=fed.mixed())
    estimator = fed.measure.Estimator(algorithm.measure, 3, 4, 1e-3, 0.1)
    assert estimator.is_balanced
    senders = fed.Senders(jnp.arange(4), jnp.arange(4), probing=jnp.array([True, True, False, False]))
    channel = fed.round.Channel(algorithm, senders, jax.random.key(0))
    messages = jnp.array([1e-6, 5.0, 1.0, 2.0])[:, None, None] * jnp.ones((4, 1, 4))
    memory = fed.first_memory(algorithm, messages)
    found = channel.received(channel.combine(channel.send(messages), jnp.ones(4), memory).aggregate)
    np.testing.assert_allclose(found, 2.0 * np.ones((1, 4)), rtol=1e-5)


def run(algorithm=None, **settings):
    given = {"local_steps": 3, "backprop_share": 0.5} | settings
    return run_projections(algorithm or algorithms.local_mosaic(0.05), **given)


@pytest.mark.parametrize("name", [thorough("local_mosaic"), slow("hiso")])
def test_a_run_is_replayed_resumed_and_shared_to_the_bit(tmp_path, name):
    algorithm = algorithms.load(name).build(0.05, {"measure": "projections"} if name == "hiso" else {})
    settings = {"rounds_per_dispatch": 1}
    run(algorithm, storage=fed.Storage(tmp_path / "run"), callbacks=[StopAt(4)], **settings)
    result = run(algorithm, storage=fed.Storage(tmp_path / "run", resume=True), **settings)
    whole = run(algorithm, **settings)
    assert_trees_identical((result.params, result.state), (whole.params, whole.state))
    assert_trees_identical((result.params, result.state), fed.replay(result.initial_params, algorithm, result.records))
    save_delta(delta_of(fed.load(tmp_path / "run")), tmp_path / "run.safetensors")
    applied = fed.apply_delta(load_delta(tmp_path / "run.safetensors"), result.initial_params, algorithm)
    assert_trees_identical(applied, result.params)
    # Every visit costs 3·K or P + 1 passes, and the resumed run counts as many as the uninterrupted run.
    assert result.forward_passes == whole.forward_passes
    able = (whole.forward_passes - 6 * CLIENTS * 7) / (9 - 7)
    assert able == int(able)
    assert 0 < able < 6 * CLIENTS


@pytest.mark.parametrize("channel", [thorough("median"), slow("multi_krum"), slow("trimmed_mean")])
def test_hostile_clients_of_a_mixed_cohort_are_replayed_to_the_bit(channel):
    algorithm = algorithms.load(f"local_mosaic+{channel}+sign_flip").build(
        0.05, {"scalar_bits": 8, "direction_groups": "shared"}
    )
    result = run(algorithm, attackers=0.25)
    assert result.diverged_at is None
    rebuilt = fed.replay(result.initial_params, algorithm, result.records)
    assert_trees_identical((result.params, result.state), rebuilt)


@pytest.mark.thorough
def test_shares_of_one_and_of_nothing():
    everyone, projections = run(backprop_share=1.0), run(backprop_share=None)
    assert_trees_identical(everyone.params, projections.params)
    assert everyone.forward_passes == projections.forward_passes == 6 * CLIENTS * 9
    nobody = run(backprop_share=0.0)
    # K does not matter to clients that take one step.
    assert_trees_identical(nobody.params, run(backprop_share=0.0, local_steps=2).params)
    assert nobody.forward_passes == 6 * CLIENTS * 7


@pytest.mark.thorough
def test_memory_decides_and_every_client_has_its_own_time():
    memory = fed.LogNormal(4e9, 1.0)
    fleet = fed.Fleet(fed.LogNormal(1.0), fed.LogNormal(1e9), fed.LogNormal(1e9), memory=memory, training_bytes=4e9)
    config = fed.SimulationConfig(
        rounds=8,
        cohort=CLIENTS,
        perturbations=6,
        batch_size=8,
        eval_every=8,
        local_steps=3,
        local_learning_rate=LOCAL,
        backprop_share="memory",
    )

    def simulation(fleet, config=config):
        participation = None if fleet is None else fed.Participation(fleet=fleet)
        return fed.Simulation(
            linear_task(), algorithms.local_mosaic(0.05), digits_population(), config, participation=participation
        )

    result = simulation(fleet).run()
    times = np.round(result.records.seconds)
    # A pass takes a second: a round takes nine passes if a client backpropagates, and seven otherwise.
    assert set(times.tolist()) <= {7.0, 9.0}
    assert 8 * CLIENTS * 7 < result.forward_passes < 8 * CLIENTS * 9
    rich = simulation(dataclasses.replace(fleet, training_bytes=1.0)).run()
    assert rich.forward_passes == 8 * CLIENTS * 9
    with pytest.raises(hiso_jax.ParameterError, match="backprop_share is memory, which needs a fleet"):
        simulation(None)


def test_refusals():
    with pytest.raises(hiso_jax.ParameterError, match="backprop_share must be given for the measure `mixed`"):
        run(dataclasses.replace(algorithms.local_mosaic(0.05), measure=fed.mixed()), backprop_share=None)
    config = fed.SimulationConfig(
        rounds=2, cohort=CLIENTS, batch_size=8, backprop_share="memory", local_learning_rate=LOCAL
    )
    with pytest.raises(hiso_jax.ParameterError, match="backprop_share is memory, which needs a fleet"):
        fed.sweep(linear_task(), algorithms.local_mosaic, [digits_population()], config, fed.Grid((0.5,)))
    with pytest.raises(hiso_jax.ParameterError, match="backprop_share is read by methods whose clients project"):
        run(algorithms.hiso(0.05))
    with pytest.raises(hiso_jax.ParameterError, match="probe_scale is read with `backprop_share`"):
        run(backprop_share=None, probe_scale=0.3)
    with pytest.raises(hiso_jax.ParameterError, match="backprop_share must be between 0 and 1"):
        run(backprop_share=1.5)
    private = algorithms.load("local_mosaic+private_mean").build(0.05, {})
    with pytest.raises(hiso_jax.ParameterError, match="probe_scale must be given for a mixed cohort in a private run"):
        run(private)
    result = run(private, probe_scale=0.3)
    assert_trees_identical(result.params, fed.replay(result.initial_params, private, result.records)[0])


def test_what_does_not_suit_a_mixed_round_is_refused():
    def loss(x, t):
        return 0.5 * ((x - t) ** 2).sum(-1)

    numbers = dict(local_steps=3, num_perturbations=4, mu=1e-3, local_learning_rate=LOCAL)
    private = channels.private_mean().into(dataclasses.replace(fed.Algorithm(zo.scale_by_zo()), measure=fed.mixed()))
    with pytest.raises(ParameterError, match="probe_scale must be given for a mixed cohort in a private run"):
        fed.make_round(loss, private, **numbers)
    with pytest.raises(ParameterError, match="difference must make one derivative estimate for each direction"):
        fed.mixed(difference="second")
    one = fed.make_round(loss, algorithms.local_mosaic(0.1), **numbers)
    state = algorithms.local_mosaic(0.1).optimizer.init(jnp.zeros(3))
    aside = fed.Aside(probing=jnp.ones(CLIENTS, bool))
    with pytest.raises(ParameterError, match="aside must have `probing` only for the measure of a mixed cohort"):
        one(jnp.zeros(3), state, jnp.zeros((CLIENTS, 3, 2, 3)), jnp.ones(CLIENTS), jax.random.key(0), aside=aside)
    with pytest.raises(ParameterError, match="backprop_share must be 0, 1 or a share of at least one of 12 clients"):
        run_projections(algorithms.local_mosaic(0.1), backprop_share=0.02)


def test_only_clients_that_measure_are_judged_by_mu():
    """Half of the scalars are of the size of rounding, but projections: a small μ would be a fault of the others."""
    scalars = np.where(PROBING[:, None], 1.0, 1e-7)[None, :, None] * np.ones((1, CLIENTS, 1, 8))
    shape = (1, CLIENTS)
    records = SimpleNamespace(
        attendance=np.full(shape, REPORTED), valid=np.ones(shape, bool), scalars=scalars.astype(np.float32),
        loss=np.ones(1, np.float32), cohort=np.arange(CLIENTS)[None], round=np.zeros(1, int),
    )  # fmt: skip

    def rule(probing):
        return None if probing is None else lambda clients: jnp.asarray(probing)[clients]

    for probing, scale, faulty in (
        (None, None, True),
        (PROBING, None, False),
        (~PROBING, None, True),
        (~PROBING, 1e-5, False),
    ):
        found = HealthWarnings(1e-3, 10, jnp.float32, rule(probing), scale)
        for _ in range(4):
            found.note(records)
        assert bool(found.about_rounding) == faulty
