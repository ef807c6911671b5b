"""MobileNet (Howard et al. 2017, arXiv 1704.04861)."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from woodjax.models.layers import Stem, check_stem, conv1, conv3

BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


class SeparableBlock(nnx.Module):
    """A 3×3 convolution of each channel by itself and a 1×1 convolution, both with batch normalisation."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs) -> None:
        """Build the block.

        Args:
            inputs: Channels in.
            outputs: Channels out.
            stride: Stride of the 3×3 convolution.
            rngs: Random numbers for the initial weights.
        """
        self.conv1: nnx.Conv = conv3(inputs, inputs, stride, rngs, groups=inputs)
        self.bn1: nnx.BatchNorm = nnx.BatchNorm(inputs, rngs=rngs)
        self.conv2: nnx.Conv = conv1(inputs, outputs, 1, rngs)
        self.bn2: nnx.BatchNorm = nnx.BatchNorm(outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        """Apply the block to a batch."""
        x = jax.nn.relu(self.bn1(self.conv1(x)))
        return jax.nn.relu(self.bn2(self.conv2(x)))


class MobileNet(nnx.Module):
    """A convolution, thirteen separable blocks, and one linear layer."""

    def __init__(self, *, classes: int = 10, stem: Stem = "cifar", rngs: nnx.Rngs) -> None:
        """Build the network.

        Args:
            classes: Number of logits.
            stem: First convolution with stride 1 (`"cifar"`) or 2 (`"imagenet"`).
            rngs: Random numbers for the initial weights.

        Raises:
            ValueError: Unknown stem.
        """
        check_stem(stem)
        self.conv1: nnx.Conv = conv3(3, 32, 1 if stem == "cifar" else 2, rngs)
        self.bn1: nnx.BatchNorm = nnx.BatchNorm(32, rngs=rngs)
        inputs = 32
        for i, (outputs, stride) in enumerate(BLOCKS):
            setattr(self, f"layers_{i}", SeparableBlock(inputs, outputs, stride, rngs=rngs))
            inputs = outputs
        self.linear: nnx.Linear = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        """Logits of a batch of NHWC images."""
        x = jax.nn.relu(self.bn1(self.conv1(x)))
        for i in range(len(BLOCKS)):
            x = getattr(self, f"layers_{i}")(x)
        return self.linear(x.mean(axis=(1, 2)))


def mobilenet_v1(rngs: nnx.Rngs, *, classes: int = 10, stem: Stem = "cifar") -> MobileNet:
    """MobileNetV1: 3,217,226 parameters for CIFAR-10, 4,231,976 for ImageNet.

    Args:
        rngs: Random numbers for the initial weights.
        classes: Number of logits.
        stem: First convolution with stride 1 (`"cifar"`) or 2 (`"imagenet"`).

    Returns:
        The network of width 1, NHWC inputs.

    References:
        Howard et al. 2017 (arXiv 1704.04861), table 1, where the last convolution of stride 2 keeps the size: its
        stride is 1 here. For CIFAR as in kuangliu/pytorch-cifar.
    """
    return MobileNet(classes=classes, stem=stem, rngs=rngs)
