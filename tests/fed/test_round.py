"""One round: masks, invalid clients, local steps, and ways of running diverged clients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hiso_jax
from hiso_jax import algorithms, fed, zo
from hiso_jax.fed.keys import CHANNEL_STREAM
from hiso_jax.fed.measure import Cohort, Estimator, Keys
from hiso_jax.fed.round import Arrived, first_memory, server_settle
from hiso_jax.fed.update import ServerState
from tests.fed.problems import assert_trees_identical
from tests.marks import slow, thorough

KEY = jax.random.key(11)
CLIENTS, BATCH = 4, 6


def loss(params, batch):
    inputs, targets = batch
    return (jnp.tanh(inputs @ params["w"]) @ params["v"] - targets) ** 2


def problem(steps, clients=CLIENTS):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"w": jax.random.normal(keys[0], (3, 5)), "v": jax.random.normal(keys[1], (5,))}
    inputs = jax.random.normal(keys[2], (clients, steps, BATCH, 3))
    return params, (inputs, jax.random.normal(keys[3], (clients, steps, BATCH)))


def one_round(steps=1, perturbations=3, tx=None, mask=None, batches=None, task_loss=loss, **settings):
    tx = tx or hiso_jax.hiso(0.05)
    params, drawn = problem(steps)
    mask = jnp.ones(CLIENTS, bool) if mask is None else jnp.array(mask)
    settings = {"local_learning_rate": 0.05, "mu": 1e-3} | settings
    run = hiso_jax.make_round(task_loss, tx, local_steps=steps, num_perturbations=perturbations, **settings)
    state = tx.init(params)
    return params, state, jax.jit(run)(params, state, batches or drawn, mask, KEY)


@pytest.mark.parametrize("method", [thorough("forward"), slow("central")])
def test_a_round_is_its_clients_one_by_one(method, x64):
    """K = 3 local steps are compared with a plain loop over clients, each with its own parameters."""
    steps, perturbations, rate, mu = 3, 2, 0.05, 1e-3
    tx = hiso_jax.hiso(0.1)
    params, state, (after, _, record) = one_round(
        steps, perturbations, tx, difference=method, mu=mu, local_learning_rate=rate
    )
    inputs, targets = problem(steps)[1]
    curvature = state[0].curvature

    @jax.jit
    def own_step(x, batch, k):
        _, g = zo.scalars(
            lambda p, b: loss(p, b).mean(),
            x,
            batch,
            KEY,
            step=k,
            curvature=curvature,
            num_perturbations=perturbations,
            mu=mu,
            difference=method,
        )
        delta = zo.accumulate(KEY, g, x, step=k, curvature=curvature)
        return g, jax.tree.map(lambda a, d: a - rate * d, x, delta)

    for client in range(CLIENTS):
        x = params
        for k in range(steps):
            g, x = own_step(x, (inputs[client, k], targets[client, k]), k)
            np.testing.assert_allclose(record.scalars[client, k], g, rtol=1e-8)
    np.testing.assert_allclose(record.aggregate, record.scalars.mean(0), rtol=1e-12)
    updates, _ = tx.update(record.aggregate, state, params, key=KEY)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(optax.apply_updates(params, updates)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


@pytest.mark.thorough
@pytest.mark.parametrize("steps", [slow(1), 3])
def test_masked_clients_do_not_count(steps):
    _, _, (_, _, whole) = one_round(steps)
    _, _, (_, _, part) = one_round(steps, mask=[True, False, True, True])
    np.testing.assert_array_equal(part.valid, [True, False, True, True])
    np.testing.assert_allclose(part.aggregate, whole.scalars[jnp.array([0, 2, 3])].mean(0), rtol=1e-5)
    assert not np.allclose(part.aggregate, whole.aggregate)


@pytest.mark.parametrize(
    ("steps", "bad"),
    [(1, np.nan), thorough(3, np.inf), *(slow(*case) for case in [(1, np.inf), (3, np.nan)])],
)
def test_one_non_finite_scalar_invalidates_its_client(steps, bad):
    _, (inputs, targets) = problem(steps)
    poisoned = inputs, targets.at[2, steps - 1, 0].set(bad)
    _, _, (after, state, record) = one_round(steps, batches=poisoned)
    np.testing.assert_array_equal(record.valid, [True, True, False, True])
    np.testing.assert_allclose(record.aggregate, record.scalars[jnp.array([0, 1, 3])].mean(0), rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after, state, record.loss)))


@pytest.mark.parametrize("directions", [thorough("keep"), "regenerate"])
def test_a_weight_that_is_not_positive_is_none(directions):
    execution = fed.ExecutionSettings(directions=directions)
    after = [
        one_round(mask=weights, execution=execution)[2][0]
        for weights in ([1.0, 2.0, 0.0, 0.0], [1.0, 2.0, -1.5, float("nan")])
    ]
    assert_trees_identical(*after)


def test_a_round_without_a_valid_client_changes_nothing():
    _, (inputs, targets) = problem(1)
    poisoned = inputs, jnp.full_like(targets, jnp.nan)
    tx = optax.chain(hiso_jax.scale_by_hiso(), optax.trace(0.9), optax.add_decayed_weights(0.1), optax.scale(-0.1))
    params, state, (after, state_after, record) = one_round(tx=tx, batches=poisoned)
    assert not record.valid.any()
    assert np.isnan(record.loss)
    for a, b in zip(jax.tree.leaves((params, state)), jax.tree.leaves((after, state_after)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.thorough
def test_ways_of_running_diverged_clients_agree(x64):
    _, _, (_, _, one_by_one) = one_round(2, execution=fed.ExecutionSettings(client_chunk=1))
    # Pieces of three clients and one become two pieces of two.
    _, _, (_, _, record) = one_round(2, execution=fed.ExecutionSettings(client_chunk=3))
    np.testing.assert_allclose(record.scalars, one_by_one.scalars, rtol=1e-7)


@pytest.mark.thorough
def test_the_local_rate_may_be_a_schedule_over_rounds():
    tx = hiso_jax.hiso(0.05)
    params, batches = problem(2)
    settings = {"local_steps": 2, "num_perturbations": 3, "mu": 1e-3}
    scheduled = hiso_jax.make_round(loss, tx, local_learning_rate=lambda r: 0.02 * (r + 1), **settings)
    fixed = hiso_jax.make_round(loss, tx, local_learning_rate=0.04, **settings)
    mask = jnp.ones(CLIENTS, bool)
    params, state, _ = jax.jit(scheduled)(params, tx.init(params), batches, mask, KEY)
    *_, one = jax.jit(scheduled)(params, state, batches, mask, KEY)
    *_, other = jax.jit(fixed)(params, state, batches, mask, KEY)
    np.testing.assert_allclose(one.scalars, other.scalars, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in algorithms.NAMES if algorithms.load(name).has_scalars])
def test_moments_are_float32_whatever_the_parameters_are(name):
    algorithm = getattr(algorithms, name)(0.01)
    params, batches = jax.tree.map(lambda x: x.astype(jnp.bfloat16), problem(1))
    state = jax.eval_shape(algorithm.optimizer.init, params)
    perturbations = algorithm.perturbations or 8
    memory = fed.first_memory(algorithm, jax.ShapeDtypeStruct((CLIENTS, 1, perturbations), jnp.float32))
    wide = [leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert jnp.bfloat16 not in wide
    run = hiso_jax.make_round(loss, algorithm, local_steps=1, num_perturbations=perturbations, mu=1e-2)
    held = (state, memory) if jax.tree.leaves(memory) else state
    after = jax.eval_shape(run, params, held, batches, jnp.ones(CLIENTS, bool), KEY)
    assert jax.tree.map(lambda x: x.dtype, after[:2]) == jax.tree.map(lambda x: x.dtype, (params, held))


def test_whole_numbers_are_not_trained():
    with pytest.raises(TypeError, match="trainable parameters must be floating point"):
        algorithms.decomfl(0.1).optimizer.init({"w": jnp.arange(3), "v": jnp.ones(2, jnp.bfloat16)})


def test_a_chain_begun_in_bfloat16_stays_so_and_can_be_scanned():
    """optax keeps the state in bfloat16; ``Algorithm.optimizer`` begins it in float32."""
    tx = optax.chain(hiso_jax.scale_by_hiso(), optax.trace(0.9), optax.scale_by_learning_rate(0.01))
    params, (inputs, targets) = jax.tree.map(lambda x: x.astype(jnp.bfloat16), problem(1))
    step = zo.step(lambda p, b: loss(p, b).mean(), tx, mu=1e-2)

    def turn(carry, number):
        *carry, reported = step(*carry, (inputs[0, 0], targets[0, 0]), jax.random.fold_in(KEY, number))
        return tuple(carry), reported

    (after, state), losses = jax.lax.scan(turn, (params, tx.init(params)), jnp.arange(3))
    assert np.isfinite(losses).all()
    assert after["w"].dtype == state[1].trace["w"].dtype == jnp.bfloat16


def test_bfloat16_parameters_keep_their_dtype():
    tx = hiso_jax.hiso(0.05)
    params, batches = problem(2)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    run = hiso_jax.make_round(loss, tx, local_steps=2, num_perturbations=2, mu=1e-2, local_learning_rate=0.05)
    after, _, record = jax.jit(run)(params, tx.init(params), batches, jnp.ones(CLIENTS, bool), KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype(jnp.bfloat16)}
    assert record.scalars.dtype == jnp.float32


def test_misuse_is_answered_with_one_sentence():
    with pytest.raises(ValueError, match="local_steps must be at least 1, got 0"):
        one_round(0)
    with pytest.raises(ValueError, match="local_steps is 2: the clients' own steps need `local_learning_rate`"):
        one_round(2, local_learning_rate=None)
    with pytest.raises(ValueError, match=r"loss must be per example, shape \(24,\) here; got \(\)"):
        one_round(task_loss=lambda params, batch: loss(params, batch).mean())
    with pytest.raises(ValueError, match="exactly one of scale_by_hiso or scale_by_zo"):
        one_round(tx=optax.sgd(0.1))


@pytest.mark.parametrize("name", ["hiso", "mosaic", "sign"])
def test_a_server_settles_messages_that_come_from_elsewhere_to_the_same_bits(name):
    algorithm, (params, batches) = getattr(algorithms, name)(0.01), problem(1)
    perturbations = algorithm.perturbations or 3
    memory = first_memory(algorithm, jax.ShapeDtypeStruct((CLIENTS, 1, perturbations), jnp.float32))
    state, mask = algorithm.optimizer.init(params), jnp.array([True, False, True, True])
    run = jax.jit(fed.make_round(loss, algorithm, local_steps=1, num_perturbations=perturbations, mu=1e-3))
    after, _, record = run(params, state, batches, mask, KEY)
    settle = server_settle(algorithm, Estimator(fed.probes(), 1, perturbations, 1e-3), fed.ExecutionSettings())
    # A server has no batches.
    cohort = Cohort(jnp.arange(CLIENTS), mask.astype(jnp.float32), ())
    keys = Keys(KEY, jax.random.fold_in(KEY, jnp.uint32(CHANNEL_STREAM)), jnp.int32(0))
    arrived = Arrived(record.scalars, record.valid, jnp.zeros(CLIENTS))
    server, settled = jax.jit(settle)(ServerState(params, state, memory), cohort, keys, arrived)
    assert_trees_identical(server.params, after)
    assert_trees_identical(settled.aggregate, record.aggregate)
