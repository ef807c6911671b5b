"""Pre-activation residual networks (He et al. 2016, arXiv 1603.05027) for CIFAR."""

from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float

from woodjax.models.layers import conv1, conv3


class PreActivationBottleneck(nnx.Module):
    """Batch normalisation, ReLU and a convolution, three times: 1×1, 3×3 and 1×1, all as wide, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs) -> None:
        """Build the block.

        Args:
            inputs: Channels in.
            outputs: Channels out and inside.
            stride: Stride of the 3×3 convolution.
            rngs: Random numbers for the initial weights.
        """
        self.bn1: nnx.BatchNorm = nnx.BatchNorm(inputs, rngs=rngs)
        self.conv1: nnx.Conv = conv1(inputs, outputs, 1, rngs)
        self.bn2: nnx.BatchNorm = nnx.BatchNorm(outputs, rngs=rngs)
        self.conv2: nnx.Conv = conv3(outputs, outputs, stride, rngs)
        self.bn3: nnx.BatchNorm = nnx.BatchNorm(outputs, rngs=rngs)
        self.conv3: nnx.Conv = conv1(outputs, outputs, 1, rngs)
        if stride != 1 or inputs != outputs:
            self.shortcut: nnx.Conv = conv1(inputs, outputs, stride, rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        """Apply the block to a batch."""
        y = self.conv1(jax.nn.relu(self.bn1(x)))
        y = self.conv2(jax.nn.relu(self.bn2(y)))
        y = self.conv3(jax.nn.relu(self.bn3(y)))
        return y + (self.shortcut(x) if hasattr(self, "shortcut") else x)


class PreResNet(nnx.Module):
    """A convolution, stages of pre-activation blocks, batch normalisation, ReLU, and one linear layer.

    Each stage after the first halves the image.
    """

    def __init__(
        self,
        blocks_per_stage: int,
        *,
        widths: Sequence[int] = (64, 128, 256),
        classes: int = 10,
        rngs: nnx.Rngs,
    ) -> None:
        """Build the network.

        Args:
            blocks_per_stage: Blocks of each stage: `n` of a PreResNet-(9n+2).
            widths: Channels of each stage.
            classes: Number of logits.
            rngs: Random numbers for the initial weights.
        """
        inputs = widths[0]
        self.conv1: nnx.Conv = conv3(3, inputs, 1, rngs)
        names = []
        for stage, width in enumerate(widths, start=1):
            for i in range(blocks_per_stage):
                stride = 2 if stage > 1 and i == 0 else 1
                names.append(f"layer{stage}_{i}")
                setattr(self, names[-1], PreActivationBottleneck(inputs, width, stride, rngs=rngs))
                inputs = width
        self.block_names: tuple[str, ...] = tuple(names)
        self.bn: nnx.BatchNorm = nnx.BatchNorm(inputs, rngs=rngs)
        self.linear: nnx.Linear = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        """Logits of a batch of NHWC images."""
        x = self.conv1(x)
        for name in self.block_names:
            x = getattr(self, name)(x)
        return self.linear(jax.nn.relu(self.bn(x)).mean(axis=(1, 2)))


def preresnet29(rngs: nnx.Rngs, *, classes: int = 10) -> PreResNet:
    """PreResNet-29 for CIFAR: 2,851,018 parameters with 10 classes.

    Args:
        rngs: Random numbers for the initial weights.
        classes: Number of logits.

    Returns:
        Three stages of three blocks with 64, 128 and 256 channels, NHWC inputs.

    References:
        He et al. 2016 (arXiv 1603.05027), section 4; widths and blocks as in yaozhewei/HAP, the code of Yu et al.
        2021 (arXiv 2101.08940), whose blocks do not widen towards their ends and whose shortcuts have no
        normalisation.
    """
    return PreResNet(3, classes=classes, rngs=rngs)
