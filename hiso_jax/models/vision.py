"""Image classifiers: a multi-layer perceptron, small convolutional networks, LeNet-5 and ResNet-18."""

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

    def __init__(
        self,
        side: int,
        kernel: int,
        features: tuple[int, int],
        classes: int,
        channels: int = 1,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        """``side``×``side`` images of ``channels``, ``kernel``×``kernel`` convolutions with ``features`` channels."""
        window = (kernel, kernel)
        self.conv1 = PooledConv(channels, features[0], window, kernel_init=lecun_normal, rngs=rngs)
        self.conv2 = nnx.Conv(
            features[0], features[1], window, kernel_init=lecun_normal, conv_general_dilated=convolution, rngs=rngs
        )
        self.output = Linear((side // 4) ** 2 * features[1], classes, kernel_init=lecun_normal, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B classes"]:
        """Logits."""
        x = nnx.relu(self.conv1(images))
        x = nnx.relu(max_pool(self.conv2(x), (2, 2)))
        return self.output(x.reshape(x.shape[0], -1))


def _conv(
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    strides: int = 1,
    padding: str = "SAME",
    bias: bool = False,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        outputs,
        (kernel, kernel),
        (strides, strides),
        padding=padding,
        use_bias=bias,
        kernel_init=lecun_normal,
        conv_general_dilated=convolution,
        rngs=rngs,
    )


class LeNet(nnx.Module):
    """LeNet-5 (LeCun et al., 1998) with ReLU and max-pools: two valid 5×5 convolutions, and three linear layers."""

    def __init__(self, side: int, channels: int, classes: int, *, rngs: nnx.Rngs) -> None:
        """``side``×``side`` images of ``channels``."""
        self.conv1 = _conv(channels, 6, 5, padding="VALID", bias=True, rngs=rngs)
        self.conv2 = _conv(6, 16, 5, padding="VALID", bias=True, rngs=rngs)
        last = ((side - 4) // 2 - 4) // 2
        self.hidden1 = Linear(last * last * 16, 120, kernel_init=lecun_normal, rngs=rngs)
        self.hidden2 = Linear(120, 84, kernel_init=lecun_normal, rngs=rngs)
        self.output = Linear(84, classes, kernel_init=lecun_normal, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B classes"]:
        """Logits."""
        x = max_pool(nnx.relu(self.conv1(images)), (2, 2))
        x = max_pool(nnx.relu(self.conv2(x)), (2, 2))
        x = nnx.relu(self.hidden1(x.reshape(x.shape[0], -1)))
        return self.output(nnx.relu(self.hidden2(x)))


class Residual(nnx.Module):
    """A basic block of ResNet: two 3×3 convolutions, and a 1×1 convolution beside them where shapes change."""

    def __init__(self, inputs: int, outputs: int, strides: int, *, rngs: nnx.Rngs) -> None:
        """``inputs`` → ``outputs`` channels; ``strides`` divides height and width."""
        self.conv1 = _conv(inputs, outputs, 3, strides=strides, rngs=rngs)
        self.norm1 = nnx.GroupNorm(outputs, GROUPS, rngs=rngs)
        self.conv2 = _conv(outputs, outputs, 3, rngs=rngs)
        self.norm2 = nnx.GroupNorm(outputs, GROUPS, rngs=rngs)
        self.changes = inputs != outputs or strides != 1
        if self.changes:
            self.conv3 = _conv(inputs, outputs, 1, strides=strides, rngs=rngs)
            self.norm3 = nnx.GroupNorm(outputs, GROUPS, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        """The block's output."""
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        return nnx.relu(y + (self.norm3(self.conv3(x)) if self.changes else x))


# Groups of the norms. Batch norms do not suit clients of few, unlike examples (Hsieh et al., arXiv 1910.00189).
GROUPS = 32
# From this side on, the first layer divides height and width by four, as for ImageNet.
LARGE = 96


class ResNet18(nnx.Module):
    """ResNet-18 (He et al., arXiv 1512.03385) with group norms (Wu and He, arXiv 1803.08494)."""

    def __init__(self, side: int, channels: int, classes: int, *, rngs: nnx.Rngs) -> None:
        """``side``×``side`` images of ``channels``."""
        self.is_large = side >= LARGE
        self.conv = _conv(channels, 64, 7 if self.is_large else 3, strides=2 if self.is_large else 1, rngs=rngs)
        self.norm = nnx.GroupNorm(64, GROUPS, rngs=rngs)
        widths = (64, 64, 128, 256, 512)
        for stage in range(1, 5):
            for block in range(2):
                inputs, strides = widths[stage - (block == 0)], 2 if stage > 1 and block == 0 else 1
                setattr(self, f"block{stage}_{block + 1}", Residual(inputs, widths[stage], strides, rngs=rngs))
        self.output = Linear(512, classes, kernel_init=lecun_normal, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B classes"]:
        """Logits."""
        x = nnx.relu(self.norm(self.conv(images)))
        x = max_pool(x, (2, 2)) if self.is_large else x
        for stage in range(1, 5):
            for block in range(1, 3):
                x = getattr(self, f"block{stage}_{block}")(x)
        return self.output(x.mean((1, 2)))


def mlp(*, side: int, hidden: int = 32, classes: int = 10) -> Model:
    """A perceptron on ``side``×``side`` images."""
    return functional(lambda rngs: MLP(side * side, hidden, classes, rngs=rngs))


def cnn(*, side: int, kernel: int, features: tuple[int, int], classes: int = 10, channels: int = 1) -> Model:
    """A convolutional network on ``side``×``side`` images; ``side`` is a multiple of 4.

    ``side=28, kernel=5, features=(16, 32)`` is the MNIST network of DeComFL and HiSo, 28,938 parameters.
    """
    return functional(lambda rngs: CNN(side, kernel, features, classes, channels, rngs=rngs))


def lenet(*, side: int, classes: int = 10, channels: int = 3) -> Model:
    """LeNet-5 on ``side``×``side`` images, 62,006 parameters for CIFAR-10; ``side`` is a multiple of 4 from 16 on."""
    return functional(lambda rngs: LeNet(side, channels, classes, rngs=rngs))


def resnet18(*, side: int, classes: int = 10, channels: int = 3) -> Model:
    """ResNet-18 with group norms on ``side``×``side`` images, 11,173,962 parameters for CIFAR-10.

    Images of fewer than 96 pixels a side keep their size in the first layer, as is usual for CIFAR-10.
    """
    return functional(lambda rngs: ResNet18(side, channels, classes, rngs=rngs))
