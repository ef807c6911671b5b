"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381)."""

from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float

from woodjax.models.layers import Stem, check_stem, conv1, conv3
from woodjax.models.resnet import ProjectionShortcut

STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class InvertedResidual(nnx.Module):
    """A 1×1 convolution that widens, a 3×3 one of each channel by itself, a 1×1 one that narrows, and a shortcut.

    Batch normalisation follows each of them, and ReLU6 all but the last.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, expansion: int, stem: Stem = "cifar", *, rngs: nnx.Rngs
    ) -> None:
        """Build the block.

        Args:
            inputs: Channels in.
            outputs: Channels out.
            stride: Stride of the 3×3 convolution; a block with 1 has a shortcut.
            expansion: How many times as many channels there are inside.
            stem: With `"imagenet"` there is no widening by 1, and no shortcut where the number of channels changes;
                with `"cifar"` it is a projection there.
            rngs: Random numbers for the initial weights.
        """
        inner = expansion * inputs
        if expansion != 1 or stem == "cifar":
            self.conv1: nnx.Conv = conv1(inputs, inner, 1, rngs)
            self.bn1: nnx.BatchNorm = nnx.BatchNorm(inner, rngs=rngs)
        self.conv2: nnx.Conv = conv3(inner, inner, stride, rngs, groups=inner)
        self.bn2: nnx.BatchNorm = nnx.BatchNorm(inner, rngs=rngs)
        self.conv3: nnx.Conv = conv1(inner, outputs, 1, rngs)
        self.bn3: nnx.BatchNorm = nnx.BatchNorm(outputs, rngs=rngs)
        self.residual: bool = stride == 1 and (inputs == outputs or stem == "cifar")
        if self.residual and inputs != outputs:
            self.shortcut: ProjectionShortcut = ProjectionShortcut(inputs, outputs, stride, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        """Apply the block to a batch."""
        y = jax.nn.relu6(self.bn1(self.conv1(x))) if hasattr(self, "conv1") else x
        y = jax.nn.relu6(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if not self.residual:
            return y
        return y + (self.shortcut(x) if hasattr(self, "shortcut") else x)


class MobileNetV2(nnx.Module):
    """A convolution, stages of inverted residuals, a 1×1 convolution, and one linear layer."""

    def __init__(
        self,
        stages: Sequence[tuple[int, int, int, int]] = STAGES,
        *,
        first: int = 32,
        last: int = 1280,
        classes: int = 10,
        stem: Stem = "cifar",
        rngs: nnx.Rngs,
    ) -> None:
        """Build the network.

        Args:
            stages: Of each stage the expansion, the channels, the number of blocks, and the stride of the first.
            first: Channels of the first convolution.
            last: Channels of the last one.
            classes: Number of logits.
            stem: `"cifar"` as in kuangliu/pytorch-cifar, with stride 1 in the first convolution and in the second
                stage, or `"imagenet"` as in the paper.
            rngs: Random numbers for the initial weights.

        Raises:
            ValueError: Unknown stem.
        """
        check_stem(stem)
        self.conv1: nnx.Conv = conv3(3, first, 1 if stem == "cifar" else 2, rngs)
        self.bn1: nnx.BatchNorm = nnx.BatchNorm(first, rngs=rngs)
        inputs, names = first, []
        for stage, (expansion, outputs, blocks, stride) in enumerate(stages):
            for i in range(blocks):
                step = stride if i == 0 and not (stage == 1 and stem == "cifar") else 1
                names.append(f"layers_{len(names)}")
                setattr(self, names[-1], InvertedResidual(inputs, outputs, step, expansion, stem, rngs=rngs))
                inputs = outputs
        self.block_names: tuple[str, ...] = tuple(names)
        self.conv2: nnx.Conv = conv1(inputs, last, 1, rngs)
        self.bn2: nnx.BatchNorm = nnx.BatchNorm(last, rngs=rngs)
        self.linear: nnx.Linear = nnx.Linear(last, classes, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        """Logits of a batch of NHWC images."""
        x = jax.nn.relu6(self.bn1(self.conv1(x)))
        for name in self.block_names:
            x = getattr(self, name)(x)
        return self.linear(jax.nn.relu6(self.bn2(self.conv2(x))).mean(axis=(1, 2)))


def mobilenet_v2(rngs: nnx.Rngs, *, classes: int = 10, stem: Stem = "cifar") -> MobileNetV2:
    """MobileNetV2: 2,296,922 parameters for CIFAR-10, 3,504,872 for ImageNet.

    Args:
        rngs: Random numbers for the initial weights.
        classes: Number of logits.
        stem: `"cifar"` or `"imagenet"`, which differ in strides and shortcuts, see `MobileNetV2`.

    Returns:
        The network of width 1 with ReLU6, NHWC inputs.

    References:
        Sandler et al. 2018 (arXiv 1801.04381), table 2; for CIFAR as in kuangliu/pytorch-cifar but for its ReLU, for
        ImageNet as in torchvision.
    """
    return MobileNetV2(classes=classes, stem=stem, rngs=rngs)
