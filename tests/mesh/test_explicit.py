"""Parameters split over a mesh whose axes are explicit, as ``jax.make_mesh`` makes it: the numbers of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hiso_jax
from hiso_jax import zo

PARAMS = {"w": np.zeros(8, np.float32), "m": np.zeros((8, 4), np.float32)}
SPLIT = {"w": PartitionSpec("a"), "m": PartitionSpec("a", "b")}


def loss(params, batch):
    return sum(jnp.mean((x - 1) ** 2) for x in params.values())


@pytest.mark.parametrize("sampler", ["gaussian", "low_rank"])
@pytest.mark.parametrize("directions", ["keep", "regenerate"])
def test_steps_on_an_explicit_mesh_are_those_of_one_device(sampler, directions):
    if jax.device_count() < 8:
        pytest.skip("needs eight devices; tests/test_on_eight_devices.py provides them")
    tx = optax.chain(hiso_jax.scale_by_hiso(sampler=sampler), optax.trace(0.5), optax.scale(-0.1))
    step = jax.jit(zo.step(loss, tx, num_perturbations=3, directions=directions))

    def trained(params):
        state = tx.init(params)
        for number in range(3):
            params, state, _ = step(params, state, None, jax.random.key(number))
        return params

    expected = trained(PARAMS)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        split = {name: jax.device_put(x, NamedSharding(mesh, SPLIT[name])) for name, x in PARAMS.items()}
        found = trained(split)
    for name, x in found.items():
        assert x.sharding.spec == SPLIT[name]
        np.testing.assert_allclose(x, expected[name], atol=1e-4)
