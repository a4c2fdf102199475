"""The number of clients in memory at a time: its choice, the pieces of a cohort, and unchanged results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hiso_jax
from hiso_jax import fed, tasks
from hiso_jax.fed.devices import evaluation_bytes, execution, execution_for, has_convolution, in_pieces
from hiso_jax.fed.measure import Cohort, Estimator, Keys
from hiso_jax.fed.round import RoundInputs, server_round
from hiso_jax.fed.run.invitation import draw_batches
from hiso_jax.fed.update import ServerState
from tests.fed.problems import linear_task
from tests.marks import slow


@pytest.mark.thorough
@given(rows=st.integers(1, 30), size=st.integers(1, 35))
def test_pieces_are_the_whole(rows, size):
    inputs = {"a": jnp.arange(rows), "b": jnp.arange(3 * rows).reshape(rows, 3)}
    seen = []

    def function(piece):
        seen.append(len(piece["a"]))
        return piece["a"] * 2, piece["b"].sum(1)

    doubled, sums = in_pieces(function, inputs, size)
    np.testing.assert_array_equal(doubled, 2 * inputs["a"])
    np.testing.assert_array_equal(sums, inputs["b"].sum(1))
    assert max(seen) <= max(size, 1)


@pytest.mark.parametrize("model", ["mlp", slow("cnn")])
def test_the_estimate_of_memory_is_safe_and_not_wild(model):
    """The estimate is between XLA's allocation for 256 more examples and eight times that."""
    task = tasks.digits(model)
    params, train = task.init(jax.random.key(0)), dict(task.train)

    def allocated(rows):
        batch = jax.tree.map(lambda a: a[:rows], train)
        return jax.jit(task.loss).lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    assert 1 <= evaluation_bytes(task.loss, params, train, 256) / (allocated(512) - allocated(256)) < 8


def planned(model="mlp", backend="cpu", budget=10**9, chunk=None):
    task = tasks.digits(model)
    params = jax.eval_shape(task.init, jax.random.key(0))
    return execution_for(task.loss, params, dict(task.train), 32, platform=backend, client_chunk=chunk, budget=budget)


def test_the_choice_follows_backend_model_budget_and_the_user():
    assert has_convolution(tasks.digits("cnn").loss, tasks.digits("cnn").init(jax.random.key(0)), tasks.digits().train)
    assert planned(model="cnn").vmapped == 1
    assert planned(model="mlp").vmapped == execution.CPU_TOGETHER
    assert planned(model="cnn", backend="gpu").vmapped > 1000
    small, large = (planned(backend="gpu", budget=budget) for budget in (10**6, 10**8))
    for one, hundred in zip(small, large, strict=True):
        assert 50 * one < hundred < 200 * one
    assert planned(backend="gpu", budget=1) == (1, 1, 1, 0)
    assert planned(model="cnn", chunk=256)[1:3] == (256, 256)
    one_by_one = planned(chunk=1)
    assert one_by_one.vmapped == 1
    assert one_by_one.stream > 1000


def test_clients_that_backpropagate_are_fewer_together():
    """A backward pass keeps the activations of every layer."""
    layers = jnp.zeros((30, 64, 64))

    def loss(params, batch):
        hidden, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(x @ (layer + params)), None), batch["x"], layers)
        return (hidden**2).sum(-1)

    params, examples = jnp.zeros(64), {"x": jnp.zeros((64, 64))}

    def together(backward):
        return execution_for(loss, params, examples, 32, platform="gpu", budget=2**26, backward=backward).vmapped

    def allocated(clients):
        rows = {"x": jax.ShapeDtypeStruct((clients, 32, 64), jnp.float32)}
        gradients = jax.vmap(jax.grad(lambda params, batch: loss(params, batch).mean()), (None, 0))
        return jax.jit(gradients).lower(params, rows).compile().memory_analysis().temp_size_in_bytes

    assert allocated(together(False)) > 2**26
    assert 2**23 < allocated(together(True)) < 2**26


def scalars(steps, clients=23, **settings):
    task, tx = linear_task(), hiso_jax.hiso(0.01)
    params = task.init(jax.random.key(0))
    numbers = jax.random.randint(jax.random.key(1), (clients, steps, 4), 0, 1437)
    batches = jax.tree.map(lambda a: jnp.asarray(a)[numbers], dict(task.train))
    run = fed.make_round(
        task.loss,
        tx,
        local_steps=steps,
        num_perturbations=2,
        mu=1e-3,
        local_learning_rate=0.01,
        execution=fed.ExecutionSettings(**settings),
    )
    mask = jnp.ones(clients, bool)
    return jax.jit(run)(params, tx.init(params), batches, mask, jax.random.key(2))[2]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        (1, {"memory_budget": 1}),
        (3, {"client_chunk": 4}),
        slow(3, {"memory_budget": 1}),
    ],
)
def test_a_cohort_in_pieces_measures_the_same(steps, settings):
    whole, pieces = scalars(steps, client_chunk=23), scalars(steps, **settings)
    tolerance = 8 * 2**-23 * float(whole.loss) / 1e-3
    # Later steps start at the results of the first, so they differ a little more.
    np.testing.assert_allclose(pieces.scalars[:, 0], whole.scalars[:, 0], atol=tolerance)
    np.testing.assert_allclose(pieces.scalars, whole.scalars, atol=4 * tolerance)
    assert np.abs(whole.scalars).mean() > 20 * tolerance


@pytest.mark.slow
def test_ten_thousand_diverged_clients_in_bounded_memory():
    """XLA's memory for a cohort of 10,000 in chunks of 256 exceeds that for 1,000 by the scalars only."""

    def allocated(clients):
        task, tx = linear_task(), hiso_jax.hiso(0.01)
        params = task.init(jax.random.key(0))
        population = fed.virtual(task.train["label"], 10**6)
        config = fed.SimulationConfig(cohort=clients, local_steps=3, local_learning_rate=0.01)
        run = server_round(
            task.loss,
            fed.Algorithm(tx),
            Estimator(fed.probes(), 3, 2, 1e-3, 0.01),
            fed.ExecutionSettings(client_chunk=256),
            draw_batches(config),
        )
        given = RoundInputs(jax.tree.map(jnp.asarray, dict(task.train)), (population, jax.random.key(1)))
        cohort = Cohort(jnp.arange(clients), jnp.ones(clients), jnp.arange(clients))
        keys = Keys(jax.random.key(2), jax.random.key(3), jnp.int32(0))
        lowered = jax.jit(run).lower(ServerState(params, tx.init(params)), cohort, keys, given)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    grown = allocated(10_000) - allocated(1000)
    # A client needs 3·2 scalars, twice, and little more. Its parameters would take 2·2,600 bytes, its examples 24,576.
    assert grown < 9000 * 300
