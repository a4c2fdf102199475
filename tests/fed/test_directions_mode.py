"""Kept directions and directions that are made again give the same bits; frozen parameters reach the loss only."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hiso_jax
from hiso_jax import fed, zo
from hiso_jax.fed.algorithm import by_scalar
from tests.fed.problems import assert_trees_identical, digits_population, digits_task, linear_task, optimizers
from tests.marks import slow

SETTINGS = {"rounds": 6, "cohort": 5, "batch_size": 8, "eval_every": 6}


MORE = [("hiso", 1), ("decomfl", 2), ("momentum", 1)]


def run(task=None, tx=None, **settings):
    config = fed.SimulationConfig(**(SETTINGS | settings))
    return fed.Simulation(task or linear_task(), tx or optimizers()["hiso"], digits_population(), config).run()


@pytest.mark.parametrize(
    ("name", "perturbations"),
    [("hiso", 5), *(slow(*case) for case in MORE)],
)
def test_both_modes_and_the_replay_are_the_same_to_the_bit(name, perturbations):
    tx = optimizers()[name]
    kept = run(tx=tx, perturbations=perturbations, directions="keep")
    made_again = run(tx=tx, perturbations=perturbations, directions="regenerate")
    np.testing.assert_array_equal(kept.records.scalars, made_again.records.scalars)
    assert_trees_identical((kept.params, kept.state), (made_again.params, made_again.state))
    assert_trees_identical((kept.params, kept.state), fed.replay(kept.initial_params, tx, kept.records))


@pytest.mark.thorough
def test_groups_that_share_one_block_are_replayed_to_the_bit():
    """A leaf within one block has one weight; XLA once fused the mean's last product into the sum over groups."""
    tx = hiso_jax.decomfl(0.02, sampler=zo.Directions(groups=2, block=64))
    kept = run(tx=tx, task=digits_task(), perturbations=2, directions="keep")
    assert_trees_identical((kept.params, kept.state), fed.replay(kept.initial_params, tx, kept.records))


@pytest.mark.thorough
@pytest.mark.parametrize("clients", [1, 2, 7, 33, 1000])
def test_the_mean_of_one_perturbation_is_that_of_many_to_the_bit(clients):
    keys = jax.random.split(jax.random.key(clients))
    scalars, weights = jax.random.normal(keys[0], (clients, 1, 5)), jax.random.uniform(keys[1], (clients,))
    key = jax.random.key(0)
    means = jax.jit(lambda s, w, p: by_scalar(lambda column, key: fed.mean(column, w, key), s, key, p))
    many = means(scalars, weights, 0)
    one = jnp.concatenate([means(scalars[:, :, p : p + 1], weights, p) for p in range(5)], 1)
    np.testing.assert_array_equal(many, one)
    np.testing.assert_allclose(many[0], np.average(scalars[:, 0], axis=0, weights=weights), rtol=1e-4, atol=1e-6)


@pytest.mark.thorough
def test_bfloat16_parameters_are_replayed_to_the_bit():
    base = linear_task()
    task = dataclasses.replace(
        base, model_init=lambda key: jax.tree.map(lambda x: x.astype(jnp.bfloat16), base.model_init(key))
    )
    tx = hiso_jax.hiso(1e-3, curvature_dtype=jnp.bfloat16)
    result = run(task, tx, perturbations=2, directions="keep")
    assert {leaf.dtype for leaf in jax.tree.leaves(result.params)} == {jnp.dtype(jnp.bfloat16)}
    assert_trees_identical((result.params, result.state), fed.replay(result.initial_params, tx, result.records))


CLIENTS = 4


def in_mode(directions):
    return fed.ExecutionSettings(directions=directions)


def one_round(directions, loss, batches, mask=None, tx=None):
    params = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3)}
    tx = tx or hiso_jax.hiso(0.05)
    round_ = fed.make_round(loss, tx, local_steps=1, num_perturbations=3, mu=1e-3, execution=in_mode(directions))
    mask = jnp.ones(CLIENTS, bool) if mask is None else jnp.array(mask)
    return jax.jit(round_)(params, tx.init(params), batches, mask, jax.random.key(3))


def quadratic(params, batch):
    return ((batch["x"] @ params["w"]) ** 2).sum(1)


def batches():
    return {"x": jax.random.normal(jax.random.key(1), (CLIENTS, 1, 6, 4))}


@pytest.mark.thorough
@pytest.mark.parametrize("mask", [None, [True, False, True, True]])
def test_a_client_that_turns_out_invalid_leaves_the_kept_sum(mask):
    """Only some of its scalars are non-finite, so Δ must be made again from the aggregate without the client."""

    def sometimes_infinite(params, batch):
        # One example of client 2 has an infinite loss whenever its loss is above the unperturbed one.
        bad = batch["x"][:, 0] > 100
        value = quadratic(params, {"x": jnp.where(bad[:, None], 1.0, batch["x"])})
        return jnp.where(bad & (value > threshold), jnp.inf, value)

    poisoned = {"x": batches()["x"].at[2, 0, 0, 0].set(1000.0)}
    threshold = float(quadratic({"w": jnp.linspace(-1, 1, 12).reshape(4, 3)}, {"x": jnp.ones((1, 4))})[0])
    kept = one_round("keep", sometimes_infinite, poisoned, mask)
    made_again = one_round("regenerate", sometimes_infinite, poisoned, mask)
    finite = np.isfinite(kept[2].scalars[2, 0])
    assert finite.any()
    assert not finite.all()
    assert not kept[2].valid[2]
    assert_trees_identical(kept, made_again)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept[:2]))


@pytest.mark.thorough
def test_frozen_parameters_reach_the_loss_and_nothing_else():
    def with_frozen(params, batch, frozen):
        return quadratic({"w": params["w"] * frozen["scale"]}, batch)

    params = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3)}
    tx = hiso_jax.hiso(0.05)
    settings = {"local_steps": 1, "num_perturbations": 3, "mu": 1e-3}
    mask, key, frozen = jnp.ones(CLIENTS, bool), jax.random.key(3), {"scale": jnp.float32(2.0)}
    given = fed.make_round(with_frozen, tx, **settings)(params, tx.init(params), batches(), mask, key, frozen=frozen)
    inside = fed.make_round(lambda p, b: with_frozen(p, b, frozen), tx, **settings)(
        params, tx.init(params), batches(), mask, key
    )
    np.testing.assert_allclose(given[2].scalars, inside[2].scalars, rtol=1e-4)
    assert jax.tree.structure(given[1]) == jax.tree.structure(tx.init(params))


@dataclasses.dataclass(frozen=True)
class WithFrozen:
    """The linear task with its bias frozen, and a metric of its own."""

    train: dict
    test: dict
    frozen: dict

    def init(self, key):
        return {"weight": linear_task().init(key)["weight"]}

    def whole(self, params, frozen):
        return {**params, **frozen}

    def loss(self, params, batch, frozen):
        return linear_task().loss(self.whole(params, frozen), batch)

    def metrics(self, params, batch, frozen):
        return linear_task().metrics(self.whole(params, frozen), batch) | {"row": batch["label"]}

    def summarise(self, outputs):
        return {"accuracy": outputs["accuracy"].mean(), "examples": len(outputs["row"])}


@pytest.mark.thorough
def test_a_task_may_freeze_parameters_and_say_how_metrics_are_summarised():
    base = linear_task()
    shapes = jax.eval_shape(base.init, jax.random.key(0))
    assert set(shapes) == {"weight", "bias"}
    task = WithFrozen(base.train, base.test, {"bias": jnp.zeros(shapes["bias"].shape)})
    tx = hiso_jax.hiso(0.01)
    result = run(task, tx, rounds=30, eval_every=15)
    assert set(result.params) == {"weight"}
    assert jax.tree.structure(zo.zo_state(result.state).curvature) == jax.tree.structure(result.params)
    assert result.metrics[-1].metrics["examples"] == 360
    assert result.metrics[-1].metrics["accuracy"] > result.metrics[0].metrics["accuracy"] + 0.1
    population = digits_population()
    config = fed.SimulationConfig(**(SETTINGS | {"rounds": 30, "eval_every": 15}))
    side_by_side = fed.sweep(task, hiso_jax.hiso, [population], config, fed.Grid([0.01, 0.02]))
    assert side_by_side.metrics["examples"].tolist() == [[[[360.0] * 3] * 2]]
    np.testing.assert_allclose(
        side_by_side.metrics["accuracy"][0, 0, 0], [row.metrics["accuracy"] for row in result.metrics], atol=0.02
    )


def test_modes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="directions must be keep or regenerate, got both"):
        fed.SimulationConfig(directions="both")
    sentence = "directions must be regenerate for several local steps, got keep"
    with pytest.raises(ValueError, match=sentence):
        run(directions="keep", local_steps=2, local_learning_rate=0.1)
    settings = {"num_perturbations": 1, "mu": 1e-3, "local_steps": 2, "local_learning_rate": 0.1}
    with pytest.raises(ValueError, match=sentence):
        fed.make_round(quadratic, hiso_jax.hiso(0.1), execution=in_mode("keep"), **settings)
    with pytest.raises(ValueError, match="directions must be keep or regenerate, got neither"):
        zo.step(quadratic, hiso_jax.hiso(0.1), directions="neither")


def test_a_training_step_has_both_modes():
    tx = hiso_jax.hiso(0.05)
    params = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3)}
    batch = {"x": batches()["x"][0, 0]}
    results = [
        jax.jit(zo.step(lambda p, b: quadratic(p, b).mean(), tx, num_perturbations=3, directions=mode))(
            params, tx.init(params), batch, jax.random.key(0)
        )
        for mode in ("keep", "regenerate")
    ]
    assert_trees_identical(*results)


CHAINS = {
    "nothing": lambda: optax.chain(optax.scale(0.0), zo.scale_by_zo(), optax.scale(-1.0)),
    "clipped": lambda: optax.chain(optax.clip(0.5), zo.scale_by_hiso(), optax.trace(0.9), optax.scale(-0.01)),
    "unchanged": lambda: optax.chain(optax.clip(1e6), zo.scale_by_hiso(), optax.scale(-0.01)),
}


BEFORE = [("clipped", 3, 1), ("clipped", 260_000, 5), ("nothing", 260_000, 1), ("unchanged", 3, 5)]
MORE_BEFORE = [case for case in itertools.product(CHAINS, (3, 260_000), (1, 5)) if case not in BEFORE]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "width", "perturbations"),
    [*BEFORE, *(slow(*case) for case in MORE_BEFORE)],
)
def test_what_stands_before_the_head_is_heeded_in_every_mode(name, width, perturbations):
    """By default, directions are made again below a million parameters and kept above."""
    tx, key = CHAINS[name](), jax.random.key(3)
    params = {"w": jnp.linspace(-1, 1, 4 * width).reshape(4, width)}
    state, mask = tx.init(params), jnp.ones(CLIENTS, bool)
    settings = {"local_steps": 1, "num_perturbations": perturbations, "mu": 1e-3}
    given = {"x": batches()["x"] / width}
    kept, made_again, default = (
        jax.jit(fed.make_round(quadratic, tx, execution=in_mode(mode), **settings))(params, state, given, mask, key)
        for mode in ("keep", "regenerate", None)
    )
    assert_trees_identical(kept, made_again)
    assert_trees_identical(kept, default)
    applied = tx.update(kept[2].aggregate, state, params, key=key)[0]
    np.testing.assert_allclose(kept[0]["w"], params["w"] + applied["w"], rtol=1e-6, atol=1e-7)
    assert (name == "nothing") == bool((kept[0]["w"] == params["w"]).all())


@pytest.mark.parametrize("mode", ["keep", "regenerate"])
def test_a_training_step_heeds_what_stands_before_the_head(mode):
    params = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3)}
    step = zo.step(lambda p, b: quadratic(p, b).mean(), CHAINS["nothing"](), directions=mode)
    after, _, _ = jax.jit(step)(
        params, CHAINS["nothing"]().init(params), {"x": batches()["x"][0, 0]}, jax.random.key(0)
    )
    np.testing.assert_array_equal(after["w"], params["w"])


@pytest.mark.parametrize("member", [optax.trace(0.9), optax.scale_by_adam(), optax.add_decayed_weights(0.1)])
@pytest.mark.parametrize("params", [{"w": jnp.ones((4, 3))}, jnp.ones(3)])
def test_what_needs_the_parameters_cannot_stand_before_the_head(member, params):
    tx = optax.chain(member, zo.scale_by_zo(), optax.scale(-1.0))
    sentence = "what stands before scale_by_hiso or scale_by_zo in a chain sees the .* and not the parameters"
    step = zo.step(lambda p, b: (jax.tree.leaves(p)[0] ** 2).sum(), tx, num_perturbations=3)
    with pytest.raises(ValueError, match=sentence):
        step(params, tx.init(params), None, jax.random.key(0))
    run = fed.make_round(
        lambda p, b: b @ jnp.ones(4) * jax.tree.leaves(p)[0].sum(), tx, local_steps=1, num_perturbations=3, mu=1e-3
    )
    with pytest.raises(ValueError, match=sentence):
        run(params, tx.init(params), batches()["x"], jnp.ones(CLIENTS, bool), jax.random.key(3))


@pytest.mark.slow
def test_a_run_with_a_member_before_the_head_is_replayed_to_the_bit():
    tx = CHAINS["clipped"]()
    kept, made_again = run(tx=tx, directions="keep"), run(tx=tx, directions="regenerate")
    assert_trees_identical((kept.params, kept.state), (made_again.params, made_again.state))
    assert_trees_identical((kept.params, kept.state), fed.replay(kept.initial_params, tx, kept.records))
