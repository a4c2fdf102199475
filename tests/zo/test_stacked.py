"""Scanned layers are their layers one by one: same directions, same perturbed parameters, same updates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiso_jax import zo
from hiso_jax.stacked import Layers, Stacked, merge, scan
from tests.marks import thorough

DEPTH = 3
KEY = jax.random.key(4)


def stacked_params():
    rng = np.random.default_rng(0)
    layers = {"w": rng.normal(size=(DEPTH, 4, 5)), "b": rng.normal(size=(DEPTH, 5))}
    params = {"in": rng.normal(size=(2, 4)), "layers": Stacked(layers), "out": rng.normal(size=5)}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def unstacked(params):
    return {**params, "layers": params["layers"].unstacked()}


SAMPLERS = {"gaussian": zo.gaussian, "rademacher": zo.rademacher, "binomial": zo.binomial, "sphere": zo.sphere}


@pytest.mark.thorough
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_direction_is_that_of_the_layers(name):
    params = stacked_params()
    z = zo.direction(KEY, params, sampler=SAMPLERS[name])
    apart = zo.direction(KEY, unstacked(params), sampler=SAMPLERS[name])
    for ours, theirs in zip(jax.tree.leaves(unstacked(z)), jax.tree.leaves(apart), strict=True):
        if name == "sphere":
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        else:
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("perturbations", [1, thorough(2), thorough(5)])
def test_an_update_is_that_of_the_layers(perturbations):
    params = stacked_params()
    curvature = jax.tree.map(lambda x: 1 + x**2, params)
    scalars = jnp.arange(1.0, perturbations + 1)
    delta = zo.accumulate(KEY, scalars, params, curvature=curvature)
    apart = zo.accumulate(KEY, scalars, unstacked(params), curvature=unstacked(curvature))
    jax.tree.map(np.testing.assert_array_equal, unstacked(delta), apart)


def forward(params, x):
    def layer(x, own, scale):
        return jnp.tanh(x @ own["w"] @ jnp.ones((5, 4)) + own["b"].sum()) * scale, x.sum()

    x, sums = scan(params["layers"], layer, x @ params["in"], jnp.arange(1.0, DEPTH + 1))
    return x.sum() + sums.sum() + params["out"].sum()


def test_layers_are_perturbed_inside_the_scan_and_alike():
    params, x = stacked_params(), jnp.ones((3, 2))
    z = zo.direction(KEY, params)
    moved = zo.perturb(params, z, 0.1)
    assert isinstance(moved["layers"], Layers)
    apart = zo.perturb(unstacked(params), unstacked(z), 0.1)
    np.testing.assert_allclose(forward(moved, x), forward(apart, x), rtol=1e-6)
    assert abs(forward(moved, x) - forward(params, x)) > 1e-3


def test_no_perturbed_copy_of_the_layers_exists():
    depth, width = 64, 128
    params = Stacked({"w": jax.ShapeDtypeStruct((depth, width, width), jnp.float32)})

    def run(params, z, x):
        moved = zo.perturb(params, z, 1e-3)
        return scan(moved, lambda x, own, _: (jnp.tanh(x @ own["w"]), None), x)[0]

    x = jax.ShapeDtypeStruct((8, width), jnp.float32)
    stats = jax.jit(run).lower(params, params, x).compile().memory_analysis()
    assert stats.temp_size_in_bytes < depth * width * width * 4 // 8


def test_trees_are_merged_layer_by_layer():
    params = stacked_params()
    parts = (
        {"layers": Stacked({"w": params["layers"].layers["w"]}), "in": params["in"]},
        {"layers": Stacked({"b": params["layers"].layers["b"]}), "out": params["out"]},
    )
    x = jnp.ones((3, 2))
    np.testing.assert_array_equal(forward(merge(*parts), x), forward(params, x))
    z = zo.direction(KEY, parts[0])
    assert forward(merge(zo.perturb(parts[0], z, 0.1), parts[1]), x) != forward(params, x)
    with pytest.raises(ValueError, match="must not share a leaf"):
        merge(params, {"in": params["in"]})
