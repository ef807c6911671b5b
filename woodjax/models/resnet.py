"""Residual networks (He et al. 2015, arXiv 1512.03385) for CIFAR (section 4.2) and ImageNet (table 1)."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from woodjax.models.layers import PADDING, Stem, check_stem, conv1, conv3

Shortcut = Literal["A", "B"]
EXPANSION = 4  # of a bottleneck


class ProjectionShortcut(nnx.Module):
    """Option B: a strided 1×1 convolution and batch normalisation."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs) -> None:
        """Build the convolution.

        Args:
            inputs: Channels in.
            outputs: Channels out.
            stride: Stride of the convolution.
            rngs: Random numbers for the initial weights.
        """
        self.conv: nnx.Conv = conv1(inputs, outputs, stride, rngs)
        self.bn: nnx.BatchNorm = nnx.BatchNorm(outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        """Project a batch."""
        return self.bn(self.conv(x))


class BasicBlock(nnx.Module):
    """Two 3×3 convolutions with batch normalisation, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut, *, rngs: nnx.Rngs) -> None:
        """Build the block.

        Args:
            inputs: Channels in.
            outputs: Channels out.
            stride: Stride of the first convolution.
            shortcut: `"A"` (subsample, zero-pad the channels on both sides) or `"B"` (1×1
                convolution), where the shape changes.
            rngs: Random numbers for the initial weights.
        """
        self.conv1: nnx.Conv = conv3(inputs, outputs, stride, rngs)
        self.bn1: nnx.BatchNorm = nnx.BatchNorm(outputs, rngs=rngs)
        self.conv2: nnx.Conv = conv3(outputs, outputs, 1, rngs)
        self.bn2: nnx.BatchNorm = nnx.BatchNorm(outputs, rngs=rngs)
        self.stride: int = stride
        self.missing: int = outputs - inputs
        if shortcut == "B" and (stride != 1 or self.missing):
            self.shortcut: ProjectionShortcut = ProjectionShortcut(inputs, outputs, stride, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        """Apply the block to a batch."""
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return jax.nn.relu(y + self._skip(x))

    def _skip(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        if hasattr(self, "shortcut"):
            return self.shortcut(x)
        before = self.missing // 2
        channels = (before, self.missing - before)
        return jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), channels))


class Bottleneck(nnx.Module):
    """1×1, 3×3 and 1×1 convolutions with batch normalisation, and a shortcut of option B."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs) -> None:
        """Build the block.

        Args:
            inputs: Channels in.
            outputs: Channels out; a quarter of them inside.
            stride: Stride of the 3×3 convolution.
            rngs: Random numbers for the initial weights.
        """
        inner = outputs // EXPANSION
        self.conv1: nnx.Conv = conv1(inputs, inner, 1, rngs)
        self.bn1: nnx.BatchNorm = nnx.BatchNorm(inner, rngs=rngs)
        self.conv2: nnx.Conv = conv3(inner, inner, stride, rngs)
        self.bn2: nnx.BatchNorm = nnx.BatchNorm(inner, rngs=rngs)
        self.conv3: nnx.Conv = conv1(inner, outputs, 1, rngs)
        self.bn3: nnx.BatchNorm = nnx.BatchNorm(outputs, rngs=rngs)
        if stride != 1 or inputs != outputs:
            self.shortcut: ProjectionShortcut = ProjectionShortcut(inputs, outputs, stride, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        """Apply the block to a batch."""
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = jax.nn.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return jax.nn.relu(y + (self.shortcut(x) if hasattr(self, "shortcut") else x))


class ResNet(nnx.Module):
    """A convolution, stages of residual blocks, and one linear layer. Each stage after the first halves the image."""

    def __init__(
        self,
        blocks_per_stage: int | Sequence[int],
        *,
        widths: Sequence[int] = (16, 32, 64),
        bottleneck: bool = False,
        classes: int = 10,
        shortcut: Shortcut = "A",
        stem: Stem = "cifar",
        rngs: nnx.Rngs,
    ) -> None:
        """Build the network.

        Args:
            blocks_per_stage: Blocks of each stage, or of all: `n` of a ResNet-(6n+2).
            widths: Channels of each stage; of a bottleneck, the inner ones.
            bottleneck: Blocks of three convolutions rather than two, with four times as many channels at their ends.
            classes: Number of logits.
            shortcut: Option of He et al. where the shape changes; bottlenecks have B.
            stem: `"cifar"`, a 3×3 convolution, or `"imagenet"`, a strided 7×7 one and a max-pool.
            rngs: Random numbers for the initial weights.

        Raises:
            ValueError: Unknown shortcut or stem.
        """
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut is {shortcut!r}: choose 'A' or 'B'.")
        check_stem(stem)
        counts = [blocks_per_stage] * len(widths) if isinstance(blocks_per_stage, int) else blocks_per_stage
        inputs = widths[0]
        self.stem = stem
        if stem == "cifar":
            self.conv1: nnx.Conv = conv3(3, inputs, 1, rngs)
        else:
            self.conv1 = nnx.Conv(3, inputs, (7, 7), strides=2, padding=((3, 3), (3, 3)), use_bias=False, rngs=rngs)
        self.bn1: nnx.BatchNorm = nnx.BatchNorm(inputs, rngs=rngs)
        names = []
        for stage, (width, count) in enumerate(zip(widths, counts, strict=True), start=1):
            outputs = EXPANSION * width if bottleneck else width
            for i in range(count):
                stride = 2 if stage > 1 and i == 0 else 1
                names.append(f"layer{stage}_{i}")
                block = (
                    Bottleneck(inputs, outputs, stride, rngs=rngs)
                    if bottleneck
                    else BasicBlock(inputs, outputs, stride, shortcut, rngs=rngs)
                )
                setattr(self, names[-1], block)
                inputs = outputs
        self.block_names: tuple[str, ...] = tuple(names)
        self.linear: nnx.Linear = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        """Logits of a batch of NHWC images."""
        x = jax.nn.relu(self.bn1(self.conv1(x)))
        if self.stem == "imagenet":
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=PADDING)
        for name in self.block_names:
            x = getattr(self, name)(x)
        return self.linear(x.mean(axis=(1, 2)))


def resnet20(rngs: nnx.Rngs, shortcut: Shortcut = "A", *, classes: int = 10) -> ResNet:
    """ResNet-20 for CIFAR: 268,336 kernel weights with option A, 269,722 parameters in all, with 10 classes.

    Args:
        rngs: Random numbers for the initial weights.
        shortcut: `"A"` (the paper's) or `"B"`.
        classes: Number of logits.

    Returns:
        The network, NHWC inputs.

    References:
        He et al. 2015 (arXiv 1512.03385), section 4.2.
    """
    return ResNet(3, classes=classes, shortcut=shortcut, rngs=rngs)


def resnet32(rngs: nnx.Rngs, shortcut: Shortcut = "A", *, classes: int = 10) -> ResNet:
    """ResNet-32 for CIFAR: 464,154 parameters with option A and 10 classes.

    Args:
        rngs: Random numbers for the initial weights.
        shortcut: `"A"` (the paper's) or `"B"`.
        classes: Number of logits.

    Returns:
        The network, NHWC inputs.

    References:
        He et al. 2015 (arXiv 1512.03385), section 4.2.
    """
    return ResNet(5, classes=classes, shortcut=shortcut, rngs=rngs)


def resnet18(rngs: nnx.Rngs, *, classes: int = 10, stem: Stem = "cifar") -> ResNet:
    """ResNet-18: 11,173,962 parameters for CIFAR-10, 11,689,512 for ImageNet.

    Args:
        rngs: Random numbers for the initial weights.
        classes: Number of logits.
        stem: `"cifar"`, a 3×3 convolution, or `"imagenet"`, a strided 7×7 one and a max-pool.

    Returns:
        The network, NHWC inputs.

    References:
        He et al. 2015 (arXiv 1512.03385), table 1; for CIFAR as in kuangliu/pytorch-cifar, for ImageNet as in
        torchvision.
    """
    widths = (64, 128, 256, 512)
    return ResNet(2, widths=widths, classes=classes, shortcut="B", stem=stem, rngs=rngs)


def resnet50(rngs: nnx.Rngs, *, classes: int = 10, stem: Stem = "cifar") -> ResNet:
    """ResNet-50: 23,520,842 parameters for CIFAR-10, 25,557,032 for ImageNet.

    Args:
        rngs: Random numbers for the initial weights.
        classes: Number of logits.
        stem: `"cifar"`, a 3×3 convolution, or `"imagenet"`, a strided 7×7 one and a max-pool.

    Returns:
        The network, NHWC inputs; the stride of a stage is in its 3×3 convolution.

    References:
        As `resnet18`.
    """
    widths = (64, 128, 256, 512)
    return ResNet((3, 4, 6, 3), widths=widths, bottleneck=True, classes=classes, shortcut="B", stem=stem, rngs=rngs)
