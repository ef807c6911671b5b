"""Wide residual networks for CIFAR (Zagoruyko & Komodakis 2016, arXiv 1605.07146)."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from woodjax.models.layers import conv1, conv3


class PreActivationBlock(nnx.Module):
    """Batch normalisation, ReLU and a 3×3 convolution, twice, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs) -> None:
        """Build the block.

        Args:
            inputs: Channels in.
            outputs: Channels out.
            stride: Stride of the first convolution.
            rngs: Random numbers for the initial weights.
        """
        self.bn1: nnx.BatchNorm = nnx.BatchNorm(inputs, rngs=rngs)
        self.conv1: nnx.Conv = conv3(inputs, outputs, stride, rngs)
        self.bn2: nnx.BatchNorm = nnx.BatchNorm(outputs, rngs=rngs)
        self.conv2: nnx.Conv = conv3(outputs, outputs, 1, rngs)
        if stride != 1 or inputs != outputs:
            self.shortcut: nnx.Conv = conv1(inputs, outputs, stride, rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        """Apply the block to a batch."""
        y = jax.nn.relu(self.bn1(x))
        skipped = self.shortcut(y) if hasattr(self, "shortcut") else x
        y = self.conv2(jax.nn.relu(self.bn2(self.conv1(y))))
        return y + skipped


class WideResNet(nnx.Module):
    """Three stages of pre-activation blocks with `16k`, `32k` and `64k` channels."""

    def __init__(self, depth: int, widening: int, *, classes: int = 10, rngs: nnx.Rngs) -> None:
        """Build the network.

        Args:
            depth: Of a WRN-depth-k: 4 more than a multiple of 6.
            widening: `k`.
            classes: Number of logits.
            rngs: Random numbers for the initial weights.

        Raises:
            ValueError: A depth that there is not.
        """
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth is {depth}: pass 10, 16, 22, 28, 34, 40, …")
        self.conv1: nnx.Conv = conv3(3, 16, 1, rngs)
        inputs = 16
        names = []
        for stage, width in enumerate((16, 32, 64), start=1):
            for i in range((depth - 4) // 6):
                stride = 2 if stage > 1 and i == 0 else 1
                names.append(f"layer{stage}_{i}")
                setattr(self, names[-1], PreActivationBlock(inputs, widening * width, stride, rngs=rngs))
                inputs = widening * width
        self.block_names: tuple[str, ...] = tuple(names)
        self.bn: nnx.BatchNorm = nnx.BatchNorm(inputs, rngs=rngs)
        self.linear: nnx.Linear = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        """Logits of a batch of NHWC images."""
        x = self.conv1(x)
        for name in self.block_names:
            x = getattr(self, name)(x)
        return self.linear(jax.nn.relu(self.bn(x)).mean(axis=(1, 2)))


def wrn28_10(rngs: nnx.Rngs, *, classes: int = 10) -> WideResNet:
    """WRN-28-10 for CIFAR: 36,479,194 parameters with 10 classes.

    Args:
        rngs: Random numbers for the initial weights.
        classes: Number of logits.

    Returns:
        The network without dropout, NHWC inputs.

    References:
        Zagoruyko & Komodakis 2016 (arXiv 1605.07146), table 1 and section 3.
    """
    return WideResNet(28, 10, classes=classes, rngs=rngs)


def wrn16_8(rngs: nnx.Rngs, *, classes: int = 10) -> WideResNet:
    """WRN-16-8 for CIFAR: 10,961,370 parameters with 10 classes.

    Args:
        rngs: Random numbers for the initial weights.
        classes: Number of logits.

    Returns:
        The network without dropout, NHWC inputs.

    References:
        Zagoruyko & Komodakis 2016 (arXiv 1605.07146), table 1 and section 3.
    """
    return WideResNet(16, 8, classes=classes, rngs=rngs)
