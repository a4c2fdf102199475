"""Small image classifiers: a multi-layer perceptron and convolutional networks."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hiso_jax.models.convolution import convolution, max_pool
from hiso_jax.models.functional import Linear, Model, functional, lecun_normal


class MLP(nnx.Module):
    """Flatten, linear, ReLU, linear."""

    def __init__(self, inputs: int, hidden: int, classes: int, *, rngs: nnx.Rngs) -> None:
        """``inputs`` pixels, ``hidden`` units, ``classes`` logits."""
        self.hidden = Linear(inputs, hidden, kernel_init=lecun_normal, rngs=rngs)
        self.output = Linear(hidden, classes, kernel_init=lecun_normal, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W 1"]) -> Float[Array, "B classes"]:
        """Logits."""
        flat = images.reshape(images.shape[0], -1)
        return self.output(nnx.relu(self.hidden(flat)))


class PooledConv(nnx.Conv):
    """A convolution with "same" padding and a 2×2 max-pool, as one matrix product.

    The maximum over a 2×2 window of k×k convolutions is the maximum over four shifted copies of the kernel, each
    (k+1)×(k+1), applied at stride 2. With few input channels this is a small matrix product over patches. The
    patches do not depend on the weights, so the P + 1 loss evaluations of a zeroth-order step share them. On MNIST's
    first layer, on CPU, it takes a quarter of the time of the convolution and the pool (``docs/reference/benchmarks``).
    """

    def __call__(self, inputs: Float[Array, "B H W C"], out_sharding: Any = None) -> Float[Array, "B H/2 W/2 features"]:
        """``max_pool(conv(inputs) + bias, 2×2)``; H and W even."""
        batch, height, width, channels = inputs.shape
        kernel = self.kernel[...]
        size, features = kernel.shape[0], kernel.shape[-1]
        shifts = [(i, j) for i in range(2) for j in range(2)]
        copies = jnp.stack([jnp.pad(kernel, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0))) for i, j in shifts], 3)
        border = size // 2
        padded = jnp.pad(inputs, ((0, 0), (border, border), (border, border), (0, 0)))
        # Windows along the width first, then along the height: the same patches in half the time, because the second
        # step copies whole rows of a window.
        windows = jnp.concatenate([padded[:, :, j : j + width - 1 : 2] for j in range(size + 1)], -1)
        patches = jnp.concatenate([windows[:, i : i + height - 1 : 2] for i in range(size + 1)], -1)
        rows = patches.reshape(-1, (size + 1) ** 2 * channels)
        outputs = rows @ copies.reshape(-1, 4 * features)
        pooled = outputs.reshape(batch, height // 2, width // 2, 4, features).max(3)
        return pooled if self.bias is None else pooled + self.bias[...]


class CNN(nnx.Module):
    """Two stages of convolution, ReLU and 2×2 max-pool, and a linear layer.

    ReLU and the maximum commute, so ReLU is applied after the pool, to a quarter of the values.
    """

    def __init__(self, side: int, kernel: int, features: tuple[int, int], classes: int, *, rngs: nnx.Rngs) -> None:
        """``side``×``side`` grey images, ``kernel``×``kernel`` convolutions with ``features`` channels."""
        window = (kernel, kernel)
        self.conv1 = PooledConv(1, features[0], window, kernel_init=lecun_normal, rngs=rngs)
        self.conv2 = nnx.Conv(
            features[0], features[1], window, kernel_init=lecun_normal, conv_general_dilated=convolution, rngs=rngs
        )
        self.output = Linear((side // 4) ** 2 * features[1], classes, kernel_init=lecun_normal, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W 1"]) -> Float[Array, "B classes"]:
        """Logits."""
        x = nnx.relu(self.conv1(images))
        x = nnx.relu(max_pool(self.conv2(x), (2, 2)))
        return self.output(x.reshape(x.shape[0], -1))


def mlp(*, side: int, hidden: int = 32, classes: int = 10) -> Model:
    """A perceptron on ``side``×``side`` images."""
    return functional(lambda rngs: MLP(side * side, hidden, classes, rngs=rngs))


def cnn(*, side: int, kernel: int, features: tuple[int, int], classes: int = 10) -> Model:
    """A convolutional network on ``side``×``side`` images.

    ``side=28, kernel=5, features=(16, 32)`` is the MNIST network of DeComFL and HiSo, 28,938 parameters.
    """
    return functional(lambda rngs: CNN(side, kernel, features, classes, rngs=rngs))
