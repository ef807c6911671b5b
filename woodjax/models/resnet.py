"""CIFAR ResNets with basic blocks (He et al. 2015, arXiv 1512.03385, section 4.2)."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Shortcut = Literal["A", "B"]
PADDING = ((1, 1), (1, 1))  # "SAME" would pad strided convolutions on one side only


def _conv3(inputs: int, outputs: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(inputs, outputs, (3, 3), strides=stride, padding=PADDING, use_bias=False, rngs=rngs)


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
        self.conv = nnx.Conv(inputs, outputs, (1, 1), strides=stride, use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(outputs, rngs=rngs)

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
        self.conv1 = _conv3(inputs, outputs, stride, rngs)
        self.bn1 = nnx.BatchNorm(outputs, rngs=rngs)
        self.conv2 = _conv3(outputs, outputs, 1, rngs)
        self.bn2 = nnx.BatchNorm(outputs, rngs=rngs)
        self.stride, self.missing = stride, outputs - inputs
        if shortcut == "B" and (stride != 1 or self.missing):
            self.shortcut = ProjectionShortcut(inputs, outputs, stride, rngs=rngs)

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


class ResNet(nnx.Module):
    """Three stages of basic blocks with 16, 32 and 64 channels."""

    def __init__(self, blocks_per_stage: int, *, classes: int = 10, shortcut: Shortcut = "A", rngs: nnx.Rngs) -> None:
        """Build the network.

        Args:
            blocks_per_stage: `n` of a ResNet-(6n+2).
            classes: Number of logits.
            shortcut: Option of He et al. where the shape changes.
            rngs: Random numbers for the initial weights.

        Raises:
            ValueError: Unknown shortcut.
        """
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut is {shortcut!r}: choose 'A' or 'B'.")
        self.conv1 = _conv3(3, 16, 1, rngs)
        self.bn1 = nnx.BatchNorm(16, rngs=rngs)
        inputs = 16
        names = []
        for stage, outputs in enumerate((16, 32, 64), start=1):
            for i in range(blocks_per_stage):
                stride = 2 if stage > 1 and i == 0 else 1
                names.append(f"layer{stage}_{i}")
                setattr(self, names[-1], BasicBlock(inputs, outputs, stride, shortcut, rngs=rngs))
                inputs = outputs
        self.block_names = tuple(names)
        self.linear = nnx.Linear(64, classes, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        """Logits of a batch of NHWC images."""
        x = jax.nn.relu(self.bn1(self.conv1(x)))
        for name in self.block_names:
            x = getattr(self, name)(x)
        return self.linear(x.mean(axis=(1, 2)))


def resnet20(rngs: nnx.Rngs, shortcut: Shortcut = "A") -> ResNet:
    """ResNet-20 for CIFAR-10: 268,336 kernel weights with option A, 269,722 parameters in all.

    Args:
        rngs: Random numbers for the initial weights.
        shortcut: `"A"` (the paper's) or `"B"`.

    Returns:
        The network, NHWC inputs.

    References:
        He et al. 2015 (arXiv 1512.03385), section 4.2.
    """
    return ResNet(3, shortcut=shortcut, rngs=rngs)
