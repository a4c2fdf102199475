"""The image models."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hiso_jax import models, tasks
from tests.marks import slow


def size(model):
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))


def test_parameter_counts():
    assert size(models.cnn(side=28, kernel=5, features=(16, 32))) == 28_938
    assert size(models.mlp(side=8)) == 2_410
    assert size(models.cnn(side=8, kernel=3, features=(8, 16))) == 1_898


@pytest.mark.parametrize(("side", "kernel", "features"), [slow(28, 5, (16, 32)), (8, 3, (8, 16))])
def test_cnn_is_plain_convolutions_relus_and_pools(side, kernel, features, x64):
    model = models.cnn(side=side, kernel=kernel, features=features)
    params = jax.tree.map(lambda x: np.random.default_rng(1).normal(size=x.shape), model.init(jax.random.key(1)))
    images = jax.random.normal(jax.random.key(3), (5, side, side, 1))

    def plain(x, layer):
        x = jax.lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return nnx.max_pool(nnx.relu(x + layer["bias"]), (2, 2), (2, 2))

    @jax.jit
    def expected(params):
        hidden = plain(plain(images, params["conv1"]), params["conv2"]).reshape(5, -1)
        return hidden @ params["output"]["kernel"] + params["output"]["bias"]

    np.testing.assert_allclose(jax.jit(model.apply)(params, images), expected(params), rtol=1e-10, atol=1e-12)


def test_init_depends_on_its_key_alone():
    model = models.mlp(side=8)
    one, same, other = (model.init(jax.random.key(seed)) for seed in (0, 0, 1))
    assert jnp.array_equal(one["hidden"]["kernel"], same["hidden"]["kernel"])
    assert not jnp.array_equal(one["hidden"]["kernel"], other["hidden"]["kernel"])


COMPILE = """
import jax, jax.numpy as jnp
from hiso_jax import models, zo

model = models.cnn(side=28, kernel=5, features=(16, 32))
params = jax.eval_shape(model.init, jax.random.key(0))
images = jax.ShapeDtypeStruct((4, 28, 28, 1), "float32")

def moved(params, images, key):
    return model.apply(jax.tree.map(jnp.add, params, zo.direction(key, params, sampler="rademacher")), images)

print(len(jax.jit(moved).lower(params, images, jax.random.key(1)).compile().as_text()))
"""


def test_signs_compile_beside_a_pooled_convolution():
    """XLA once never finished this program, in which a product reads a slice of random bits: hence a process."""
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_digits_task(model):
    task = tasks.digits(model)
    assert (len(task.train["label"]), len(task.test["label"])) == (1437, 360)
    together = np.concatenate([task.train["input"], task.test["input"]]).reshape(1797, -1)
    assert together.min() == -0.5
    assert together.max() == 0.5
    batch = jax.tree.map(lambda a: a[:7], dict(task.test))
    params = task.init(jax.random.key(0))
    metrics = task.metrics(params, batch)
    assert metrics["accuracy"].shape == task.loss(params, batch).shape == (7,)
    np.testing.assert_allclose(metrics["loss"], task.loss(params, batch))


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match="model must be mlp or cnn for digits, got vit"):
        tasks.digits("vit")


@pytest.mark.parametrize(("strides", "padding"), [((1, 1), "SAME"), ((2, 1), "VALID"), ((2, 2), [(1, 0), (2, 2)])])
def test_convolution_has_the_bits_of_xla_and_its_derivatives(strides, padding, x64):
    images, kernel, weights = (
        jax.random.normal(jax.random.key(seed), shape)
        for seed, shape in enumerate([(3, 8, 9, 2), (3, 5, 2, 4), (3, 8, 9, 4)])
    )

    def of(convolve):
        def loss(images, kernel):
            out = convolve(images, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
            return (jnp.sin(out) * weights[:, : out.shape[1], : out.shape[2]]).sum()

        gradient = jax.grad(loss, (0, 1))
        moved = (images + 1, kernel - 1)
        return loss(images, kernel), gradient(images, kernel), jax.jvp(gradient, (images, kernel), moved)

    own, expected = of(models.convolution), of(jax.lax.conv_general_dilated)
    np.testing.assert_array_equal(own[0], expected[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), own, expected)


def test_convolution_leaves_other_layouts_to_xla():
    images, kernel = jnp.ones((2, 6, 6, 4)), jnp.ones((3, 3, 2, 4))
    given = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 2, "rhs_dilation": (2, 1)}
    own, expected = (
        f(images, kernel, (1, 1), "SAME", **given) for f in (models.convolution, jax.lax.conv_general_dilated)
    )
    np.testing.assert_array_equal(own, expected)


@pytest.mark.parametrize("padding", [[(-1, 0), (2, -2)], [(0, 0), (-3, -3)]])
def test_convolution_crops_as_xla_does(padding):
    images, kernel = jnp.ones((2, 6, 6, 2)), jnp.ones((3, 3, 2, 4))

    def of(convolve):
        def loss(kernel):
            return convolve(images, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")).sum()

        return jax.value_and_grad(loss)(kernel)

    jax.tree.map(np.testing.assert_array_equal, of(models.convolution), of(jax.lax.conv_general_dilated))


def test_convolution_passes_other_arguments_on():
    layout = ("NHWC", "HWIO", "NHWC")
    with pytest.raises(TypeError, match="frobnicate"):
        models.convolution(
            jnp.ones((1, 4, 4, 1)), jnp.ones((2, 2, 1, 1)), (1, 1), "SAME", dimension_numbers=layout, frobnicate=3
        )


@pytest.mark.parametrize("window", [(2, 2), (3, 2)])
def test_the_derivative_of_a_pool_has_the_bits_of_flax(window):
    # Whole numbers from a small range: most windows have several maxima.
    inputs = jnp.asarray(np.random.default_rng(0).integers(0, 3, (3, 7, 9, 4)), jnp.float32)
    weights = jax.random.normal(jax.random.key(0), models.max_pool(inputs, window).shape)
    ours, flax = (
        jax.jit(jax.value_and_grad(lambda x, pool=pool: (pool(x) * weights).sum()))(inputs)
        for pool in (lambda x: models.max_pool(x, window), lambda x: nnx.max_pool(x, window, window))
    )
    jax.tree.map(np.testing.assert_array_equal, ours, flax)
