"""Projections of clients' own progress: against NumPy, beside finite differences, replayed, resumed and refused."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hiso_jax
from hiso_jax import algorithms, channels, fed, zo
from hiso_jax.fed.ledger import delta_of, load_delta, save_delta
from tests.callbacks import StopAt
from tests.fed.problems import assert_trees_identical, digits_population, digits_task, linear_task
from tests.fed.test_mosaic import coded
from tests.marks import slow, thorough

CLIENTS, LOCAL = 5, 0.03


def run(algorithm, task=None, storage=None, callbacks=(), **settings):
    given = {"rounds": 6, "cohort": CLIENTS, "perturbations": 6, "batch_size": 8, "eval_every": 3} | settings
    config = fed.SimulationConfig(**given, local_learning_rate=LOCAL)
    return fed.Simulation(
        task or linear_task(), algorithm, digits_population(), config, storage=storage, callbacks=callbacks
    ).run()


def projected(algorithm, optimizer=None):
    return dataclasses.replace(algorithm, measure=fed.projections(optimizer))


# ---------------------------------------------------------------- an independent implementation


def read(gradient, x, direction, *, steps, perturbations, groups, bits, rate, weights, decay=0.0):
    """One round by the formulas, from gradient(i, k, x) and direction(g·P + p); returns x after the round.

    ``decay`` is the decay of heavy-ball momentum in the clients' own steps.
    """
    sent = np.zeros((len(weights), perturbations))
    for i in range(len(weights)):
        own, trace, total = x.copy(), 0.0, 0.0
        for k in range(steps):
            trace = decay * trace + gradient(i, k, own)
            own = own - LOCAL * trace
            total = total + trace
        z = [direction((i % groups) * perturbations + p) for p in range(perturbations)]
        sent[i] = coded(np.array([(total / steps * u).sum() for u in z])[None], bits)[0]
    lengths = np.sqrt((sent**2).mean(1))
    factor = np.minimum(1, np.sort(lengths)[(len(lengths) - 1) // 2] / lengths)
    delta = 0.0
    for i, p in itertools.product(range(len(weights)), range(perturbations)):
        share = weights[i] * factor[i] / weights.sum() / perturbations
        delta = delta + share * sent[i, p] * direction((i % groups) * perturbations + p)
    return x - rate * delta


CASES = list(itertools.product((1, 2, 4, 8, 32), (1, 2, CLIENTS), (1, 5)))
LIGHT = [(1, CLIENTS, 5), (32, 2, 1)]


@pytest.mark.parametrize(("bits", "groups", "steps"), [case if case in LIGHT else slow(*case) for case in CASES])
@pytest.mark.parametrize("sampler", ["gaussian", slow("hadamard"), slow("low_rank")])
@pytest.mark.parametrize("shaped", [True, slow(False)])
def test_a_round_is_the_formulas(bits, groups, steps, sampler, shaped, x64):
    """A round in double precision agrees with the formulas to 1e-9, with and without a curvature."""
    rng, perturbations = np.random.default_rng(bits * 100 + groups), 4
    shape = (8, 5)
    targets = jnp.asarray(rng.normal(size=(CLIENTS, steps, 3, *shape)) * rng.uniform(0.5, 3, (CLIENTS, 1, 1, 1, 1)))
    weights = jnp.asarray(rng.uniform(0.5, 2, CLIENTS))
    start, key = jnp.asarray(rng.normal(size=shape)), jax.random.key(7)

    def loss(x, targets):
        return 0.5 * ((x - targets) ** 2).sum((1, 2)) + jnp.sin(x).sum()

    head = zo.scale_by_hiso(sampler=sampler) if shaped else zo.scale_by_zo(sampler=sampler)
    mosaic = hiso_jax.mosaic(0.1, scalar_bits=bits)
    tx = zo.grouped(optax.chain(head, optax.scale_by_learning_rate(0.1)), groups=groups)
    algorithm = projected(dataclasses.replace(mosaic, tx=tx))
    one = hiso_jax.make_round(
        loss, algorithm, local_steps=steps, num_perturbations=perturbations, mu=1e-3, local_learning_rate=LOCAL
    )
    state = algorithm.optimizer.init(start)
    if shaped:
        # The curvature is not 1 everywhere.
        h = zo.zo_state(state).curvature
        other = jax.tree.map(lambda leaf: leaf * jnp.asarray(rng.uniform(0.5, 2, leaf.shape)), h)
        state = optax.tree.set(state, curvature=other)
    found, _, record = jax.jit(one)(start, state, targets, weights, key)
    assert bool(record.valid.all())
    states = zo.zo_state(state)
    directions = states.grouped_directions(key, 0, start, groups=groups, num_perturbations=perturbations)
    made = [np.asarray(zo.made_dense(directions.of(q))) for q in range(groups * perturbations)]
    host = np.asarray(targets)
    expected = read(
        lambda i, k, x: x - host[i, k].mean(0) + np.cos(x),
        np.asarray(start),
        lambda q: made[q],
        steps=steps,
        perturbations=perturbations,
        groups=groups,
        bits=bits,
        rate=0.1,
        weights=np.asarray(weights),
    )
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert np.abs(expected - np.asarray(start)).max() > 1e-3


def test_another_local_optimizer_starts_afresh_each_round(x64):
    rng = np.random.default_rng(3)
    targets, start = jnp.asarray(rng.normal(size=(CLIENTS, 4, 3, 7))), jnp.asarray(rng.normal(size=7))
    algorithm = projected(
        hiso_jax.mosaic(0.1, scalar_bits=32, direction_groups="shared"), lambda rate: optax.sgd(rate, momentum=0.9)
    )
    one = hiso_jax.make_round(
        lambda x, t: 0.5 * ((x - t) ** 2).sum(-1),
        algorithm,
        local_steps=4,
        num_perturbations=3,
        mu=1e-3,
        local_learning_rate=LOCAL,
    )
    state, key, host = algorithm.optimizer.init(start), jax.random.key(1), np.asarray(targets)
    found, _, _ = jax.jit(one)(start, state, targets, jnp.ones(CLIENTS), key)
    directions = zo.zo_state(state).grouped_directions(key, 0, start, groups=1, num_perturbations=3)
    expected = read(
        lambda i, k, x: x - host[i, k].mean(0),
        np.asarray(start),
        lambda q: np.asarray(directions.of(q)),
        steps=4,
        perturbations=3,
        groups=1,
        bits=32,
        rate=0.1,
        weights=np.ones(CLIENTS),
        decay=0.9,
    )
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("name", ["hiso", thorough("mosaic")])
def test_finite_differences_tend_to_projections(name, x64):
    rng = np.random.default_rng(5)
    targets, start = jnp.asarray(rng.normal(size=(CLIENTS, 1, 3, 9))), jnp.asarray(rng.normal(size=9))
    records = []
    plain = dataclasses.replace(algorithms.load(name).build(0.1, {}), wire=fed.Wire())
    for algorithm, mu in ((plain, 1e-4), (plain, 1e-6), (projected(plain), 1e-3)):
        one = hiso_jax.make_round(
            lambda x, t: 0.5 * ((x - t) ** 2).sum(-1) + jnp.sin(x).sum(),
            algorithm,
            local_steps=1,
            num_perturbations=4,
            mu=mu,
        )
        memory = fed.first_memory(algorithm, jax.ShapeDtypeStruct((CLIENTS, 1, 4), jnp.float64))
        own = algorithm.optimizer.init(start)
        state = (own, memory) if jax.tree.leaves(memory) else own
        measured = jax.jit(one)(start, state, targets, jnp.ones(CLIENTS), jax.random.key(0))[2]
        records.append(np.asarray(measured.scalars))
    coarse, fine, exact = records
    assert np.abs(fine - exact).max() < 0.02 * np.abs(coarse - exact).max() < 1e-3 * np.abs(exact).max()


# ---------------------------------------------------------------- in runs


@pytest.mark.parametrize("steps", [1, slow(3)])
@pytest.mark.parametrize("name", ["mosaic", thorough("hiso"), slow("zo_adam"), slow("fed_kseed")])
def test_a_run_is_replayed_to_the_bit_and_shared_as_a_delta(tmp_path, name, steps):
    algorithm = projected(algorithms.load(name).build(0.05, {}))
    result = run(algorithm, storage=fed.Storage(tmp_path / "run"), local_steps=steps)
    assert result.records.scalars is not None
    # A gradient costs three forward passes, and a message is one vector whatever K is.
    assert result.forward_passes == 6 * CLIENTS * 3 * steps
    assert jax.tree.leaves(result.records.valid)[0].all()
    rebuilt = fed.replay(result.initial_params, algorithm, result.records)
    assert_trees_identical((result.params, result.state), rebuilt)
    save_delta(delta_of(fed.load(tmp_path / "run")), tmp_path / "run.safetensors")
    applied = fed.apply_delta(load_delta(tmp_path / "run.safetensors"), result.initial_params, algorithm)
    assert_trees_identical(applied, result.params)


@pytest.mark.thorough
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    algorithm, settings = projected(hiso_jax.mosaic(0.05)), {"local_steps": 2, "rounds_per_dispatch": 1}
    whole = run(algorithm, **settings)
    run(algorithm, storage=fed.Storage(tmp_path / "run"), callbacks=[StopAt(4)], **settings)
    resumed = run(algorithm, storage=fed.Storage(tmp_path / "run", resume=True), **settings)
    assert_trees_identical((resumed.params, resumed.state), (whole.params, whole.state))


@pytest.mark.thorough
def test_a_network_learns_with_local_steps():
    """Its loss falls further in 20 rounds than with one gradient of each client."""
    losses = []
    for steps in (1, 5):
        algorithm = projected(hiso_jax.mosaic(1.0, scalar_bits=1))
        result = run(algorithm, digits_task(), rounds=20, perturbations=64, local_steps=steps, eval_every=20)
        losses.append([row.metrics["loss"] for row in result.metrics])
    assert losses[1][-1] < losses[0][-1] < losses[0][0]


def test_what_does_not_suit_is_refused():
    with pytest.raises(hiso_jax.ParameterError, match="local_learning_rate must be given for projections of 3"):
        hiso_jax.make_round(
            lambda x, t: x.sum() + t,
            projected(fed.Algorithm(hiso_jax.decomfl(0.1))),
            local_steps=3,
            num_perturbations=1,
            mu=1e-3,
        )
    with pytest.raises(hiso_jax.ParameterError, match="directions must be regenerate for projections, got keep"):
        run(projected(fed.Algorithm(hiso_jax.decomfl(0.1))), directions="keep")
    with pytest.raises(hiso_jax.ParameterError, match="measure must not be given for a method that has a measure"):
        algorithms.load("hizoo").build(0.1, {"measure": "projections"})
    with pytest.raises(
        hiso_jax.ParameterError, match="local_learning_rate must be given for projections of an optimizer's steps"
    ):
        hiso_jax.make_round(
            lambda x, t: x.sum() + t,
            projected(fed.Algorithm(hiso_jax.decomfl(0.1)), optax.adam),
            local_steps=1,
            num_perturbations=1,
            mu=1e-3,
        )
    with pytest.raises(hiso_jax.ParameterError, match="send must be of"):
        fed.Algorithm(hiso_jax.decomfl(0.1), send=(channels.sign_flip(),))


@pytest.mark.thorough
def test_a_sweep_takes_the_clients_rate_of_the_configuration():
    """The sweep does not take the server's rate, which is more than ten times as large."""
    config = fed.SimulationConfig(
        rounds=4, cohort=CLIENTS, perturbations=8, batch_size=8, eval_every=4, local_learning_rate=0.03
    )
    algorithm = algorithms.local_mosaic
    swept = fed.sweep(linear_task(), algorithm, [digits_population()], config, fed.Grid((0.5,)))
    alone = fed.Simulation(linear_task(), algorithm(0.5), digits_population(), config).run()
    np.testing.assert_allclose(swept.metrics["loss"][0, 0, 0, -1], alone.metrics[-1].metrics["loss"], rtol=1e-3)


@pytest.mark.thorough
def test_mu_is_no_concern_of_projections():
    """Projections are no differences of losses, so a small μ causes no warning."""
    assert run(algorithms.local_mosaic(0.1), mu=1e-9, local_steps=1).health_warnings == ()


def test_an_optimizer_at_rate_zero_makes_no_progress():
    algorithm = projected(hiso_jax.mosaic(0.1, scalar_bits=32), lambda rate: optax.sgd(rate, momentum=0.9))
    one = hiso_jax.make_round(
        lambda x, t: 0.5 * ((x - t) ** 2).sum(-1), algorithm, local_steps=2, num_perturbations=3, mu=1e-3,
        local_learning_rate=lambda count: 0.0 * count,
    )  # fmt: skip
    start = jnp.ones(7)
    found, _, record = jax.jit(one)(
        start, algorithm.optimizer.init(start), jnp.zeros((CLIENTS, 2, 3, 7)), jnp.ones(CLIENTS), jax.random.key(1)
    )
    assert bool(record.valid.all())
    np.testing.assert_array_equal(found, start)


@pytest.mark.parametrize("implementation", ["threefry2x32", thorough("rbg")])
@pytest.mark.parametrize(
    ("make", "exact"),
    [
        (lambda: hiso_jax.mosaic(0.1, scalar_bits=32, clipping=False), False),
        thorough(lambda: projected(hiso_jax.mosaic(0.1, scalar_bits=32, clipping=False)), True),
        (lambda: algorithms.fed_kseed(0.1), False),
    ],
    ids=["signs", "projected", "drawn"],
)
def test_every_group_measures_along_its_own_directions(make, exact, implementation):
    """Other generators draw other bits under a vmap over groups, which Δ is not."""
    rng, count, algorithm = np.random.default_rng(0), 3, make()
    slopes, start = jnp.asarray(rng.normal(size=(40, 6)), jnp.float32), jnp.zeros(6)
    key = jax.random.key(3, impl=implementation)
    one = hiso_jax.make_round(lambda x, t: t @ x, algorithm, local_steps=1, num_perturbations=count, mu=1e-2)
    state = algorithm.optimizer.init(start)
    _, _, record = jax.jit(one)(start, state, slopes[:, None, None], jnp.ones(40), key)
    directions = zo.zo_state(state).grouped_directions(key, 0, start, groups=40, num_perturbations=count)
    made = np.stack([zo.made_dense(directions.of(q)) for q in range(40 * count)]).reshape(40, count, 6)
    found = np.asarray(zo.directional_derivatives(record.scalars)).reshape(40, count)
    np.testing.assert_allclose(found, np.einsum("cd,cpd->cp", slopes, made), atol=1e-5 if exact else 1e-3)
