"""Only scalars cross the clients' axis, whatever the size of the model."""

import functools
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax
from hiso_jax import algorithms, fed, tasks
from hiso_jax.fed.devices import check_mesh
from hiso_jax.fed.run import describe, programs
from hiso_jax.models import lm
from hiso_jax.plan import collectives, read
from hiso_jax.tasks.text import text_shapes
from tests.marks import slow

ROUNDS, COHORT, STEPS, PERTURBATIONS, WIDTH = 3, 6, 2, 5, 16_384


def wide_task():
    digits = tasks.digits()

    def init(key):
        return {"hidden": 0.1 * jax.random.normal(key, (64, WIDTH)), "output": jnp.zeros((WIDTH, 10))}

    def apply(params, images):
        return jnp.tanh(images.reshape(len(images), -1) @ params["hidden"]) @ params["output"]

    return tasks.Classification(init, apply, digits.train, digits.test)


@functools.cache
def compiled(mesh, method=None):
    task = wide_task()
    config = fed.SimulationConfig(
        rounds=ROUNDS,
        cohort=COHORT,
        local_steps=STEPS,
        perturbations=PERTURBATIONS,
        batch_size=4,
        eval_every=ROUNDS,
        local_learning_rate=0.01,
    )
    population = fed.iid(len(task.train["label"]), 20)
    simulation = fed.Simulation(task, method or hiso_jax.hiso(0.01), population, config, mesh=mesh)
    initial = task.init(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(initial)) >= 10**6
    setup = simulation._prepared
    carry, shardings = programs.first_state(setup, initial)
    costs = programs.costs_of(setup.algorithm, setup.estimator, carry.server, setup.config)
    return programs.trace(setup, costs, carry, shardings).compile(setup)[0].as_text()


@pytest.mark.parametrize(
    ("mesh", "method"),
    [
        ("8", None),
        ("2x4", None),
        slow("2x4", hiso_jax.mosaic(0.01, scalar_bits=2)),
        slow("8", hiso_jax.mosaic(0.01, scalar_bits=2)),
    ],
    indirect=["mesh"],
)
def test_only_scalars_cross_the_clients(mesh, method):
    clients, model = mesh.shape["clients"], mesh.shape["model"]
    found = list(collectives(read(compiled(mesh, method)), mesh))
    crossing = [c for c in found if "clients" in c.axes]
    padded = COHORT + -COHORT % clients
    # The scalars [C, K, P] and the losses [C] cross once a round, whatever operation a backend chooses.
    expected = ROUNDS * 4 * padded * (STEPS * PERTURBATIONS + 1)
    assert sum(c.times * c.bytes for c in crossing) == expected
    # Only sums of activations cross the axis model: neither directions nor the signs of their groups do.
    between = [c for c in found if c not in crossing]
    assert all(c.bytes < 4 * 64 * WIDTH // model // 2 for c in between)


@pytest.mark.parametrize("mesh", ["8"], indirect=True)
def test_of_projections_only_scalars_cross_the_clients(mesh):
    """Each client sends one vector of P scalars and one loss a round, whatever K is."""
    found = list(collectives(read(compiled(mesh, algorithms.local_mosaic(0.01))), mesh))
    padded = COHORT + -COHORT % mesh.shape["clients"]
    assert sum(c.times * c.bytes for c in found) == ROUNDS * 4 * padded * (PERTURBATIONS + 1)


@pytest.mark.parametrize("mesh", ["8"], indirect=True)
def test_of_vectors_only_their_sum_crosses_the_clients(mesh):
    """A first-order round sends one sum as large as the model, the weights, and each client's validity and loss."""
    found = collectives(read(compiled(mesh, algorithms.fed_avg(0.01))), mesh)
    parameters = 4 * (64 * WIDTH + WIDTH * 10)
    padded = COHORT + -COHORT % mesh.shape["clients"]
    assert sum(c.times * c.bytes for c in found) == ROUNDS * (parameters + 4 + padded * (4 + 1))


@pytest.mark.parametrize("mesh", ["8", "2x4"], indirect=True)
def test_a_direction_is_made_in_parts(mesh):
    """No device draws more than its own part of the largest parameter."""
    text, model = compiled(mesh), mesh.shape["model"]
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"u32\[([\d,]+)\]", text)}
    assert max(np.prod(shape) for shape in shapes) == 64 * WIDTH // model
    between = [c for c in collectives(read(text), mesh) if c.axes == ("model",)]
    assert bool(between) == (model > 1)
    # Only sums of activations cross the axis model: nothing is as large as a part of a parameter.
    assert all(c.bytes < 4 * 64 * WIDTH // model // 2 for c in between)


@pytest.mark.parametrize("mesh", ["2x4"], indirect=True)
def test_a_layer_of_a_language_model_takes_two_sums_across_the_devices(mesh):
    """In Megatron's layout, with all parameters trained and perturbed, a layer sends nothing else."""
    layers, tokens, batch = 2, 8, 4
    shape = replace(
        lm.SHAPES["opt-125m"], vocab_size=64, hidden_size=32, embedding_size=32, layers=layers, heads=4, kv_heads=4,
        head_dim=8, mlp_size=64, max_positions=16, learned_positions=18,
    )  # fmt: skip
    model = lm.tuned_shapes(lm.Decoder(shape))
    task = text_shapes("sst2", model, max_length=tokens, rows=(64, 8))
    population = fed.Population(jax.ShapeDtypeStruct((64,), jnp.int32), jax.ShapeDtypeStruct((9,), jnp.int32))
    config = fed.SimulationConfig(
        rounds=ROUNDS,
        cohort=4,
        batch_size=batch,
        perturbations=PERTURBATIONS,
        eval_every=ROUNDS,
        directions="regenerate",
    )
    given = fed.RunSpec(task, model.trained, population, fed.Participation())
    run = describe(given, hiso_jax.hiso(1e-3), config, mesh, memory_budget=10**8)
    with run.prepared.on_mesh():
        program = read(run.dispatch.lower().compile().as_text())
    activations = (2 * batch, 1, 32), (2 * batch, tokens, 32)
    found = [c for c in collectives(program, mesh) if c.axes == ("model",)]
    sums = [c for c in found if any(shape.dims in activations for shape in c.shapes)]
    # Each layer takes two sums, and the embedding takes one, because its rows are split, too.
    assert sum(c.times for c in sums) == ROUNDS * (PERTURBATIONS + 1) * (2 * layers + 1)
    others = [c for c in found if c not in sums and math.prod(c.shapes[0].dims) > 2 * batch * 2]
    assert not others, [(c.kind, c.shapes, c.scope) for c in others]


@pytest.mark.parametrize("mesh", ["8"], indirect=True)
def test_meshes_that_cannot_be_are_refused(mesh):
    with pytest.raises(ValueError, match="devices must be between 1 and the number present, 8, got 9"):
        fed.make_mesh(9)
    with pytest.raises(ValueError, match="model_shards must divide the number of devices, 8, got 3"):
        fed.make_mesh(8, model_shards=3)
    other = jax.make_mesh((8,), ("data",))
    with pytest.raises(ValueError, match=r"mesh must have an axis 'clients' .* got axes \('data',\)"):
        check_mesh(other)
    # Explicit axes, JAX's own default, are accepted, too.
    assert check_mesh(jax.make_mesh((8,), ("clients",))).axis_types == (jax.sharding.AxisType.Auto,)
