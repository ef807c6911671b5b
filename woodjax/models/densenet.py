"""DenseNet-BC for CIFAR (Huang et al. 2016, arXiv 1608.06993)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from woodjax.models.layers import conv1, conv3

BOTTLENECK = 4  # channels of a 1×1 convolution, in growth rates


class DenseLayer(nnx.Module):
    """Batch normalisation, ReLU and a convolution, twice: 1×1 and 3×3. The result is joined to the input."""

    def __init__(self, inputs: int, growth: int, *, rngs: nnx.Rngs) -> None:
        """Build the layer.

        Args:
            inputs: Channels in.
            growth: Channels that are added.
            rngs: Random numbers for the initial weights.
        """
        self.bn1: nnx.BatchNorm = nnx.BatchNorm(inputs, rngs=rngs)
        self.conv1: nnx.Conv = conv1(inputs, BOTTLENECK * growth, 1, rngs)
        self.bn2: nnx.BatchNorm = nnx.BatchNorm(BOTTLENECK * growth, rngs=rngs)
        self.conv2: nnx.Conv = conv3(BOTTLENECK * growth, growth, 1, rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c2"]:
        """Apply the layer to a batch."""
        y = self.conv1(jax.nn.relu(self.bn1(x)))
        return jnp.concatenate([x, self.conv2(jax.nn.relu(self.bn2(y)))], axis=-1)


class Transition(nnx.Module):
    """Batch normalisation, ReLU, a 1×1 convolution to half of the channels, and an average over 2×2."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs) -> None:
        """Build the transition.

        Args:
            inputs: Channels in.
            rngs: Random numbers for the initial weights.
        """
        self.bn: nnx.BatchNorm = nnx.BatchNorm(inputs, rngs=rngs)
        self.conv: nnx.Conv = conv1(inputs, inputs // 2, 1, rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        """Apply the transition to a batch."""
        return nnx.avg_pool(self.conv(jax.nn.relu(self.bn(x))), (2, 2), strides=(2, 2))


class DenseNet(nnx.Module):
    """A convolution, blocks of dense layers with transitions between them, and one linear layer."""

    def __init__(self, layers_per_block: Sequence[int], *, growth: int = 12, classes: int = 10, rngs: nnx.Rngs) -> None:
        """Build the network.

        Args:
            layers_per_block: Dense layers of each block.
            growth: Channels that each of them adds; the first convolution has twice as many.
            classes: Number of logits.
            rngs: Random numbers for the initial weights.
        """
        inputs = 2 * growth
        self.conv1: nnx.Conv = conv3(3, inputs, 1, rngs)
        names = []
        for block, layers in enumerate(layers_per_block, start=1):
            if block > 1:
                names.append(f"trans{block - 1}")
                setattr(self, names[-1], Transition(inputs, rngs=rngs))
                inputs //= 2
            for i in range(layers):
                names.append(f"dense{block}_{i}")
                setattr(self, names[-1], DenseLayer(inputs, growth, rngs=rngs))
                inputs += growth
        self.block_names: tuple[str, ...] = tuple(names)
        self.bn: nnx.BatchNorm = nnx.BatchNorm(inputs, rngs=rngs)
        self.linear: nnx.Linear = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        """Logits of a batch of NHWC images."""
        x = self.conv1(x)
        for name in self.block_names:
            x = getattr(self, name)(x)
        return self.linear(jax.nn.relu(self.bn(x)).mean(axis=(1, 2)))


def densenet40(rngs: nnx.Rngs, *, classes: int = 10) -> DenseNet:
    """DenseNet-BC of depth 40 and growth 12 for CIFAR: 176,122 parameters with 10 classes.

    Args:
        rngs: Random numbers for the initial weights.
        classes: Number of logits.

    Returns:
        Three blocks of six layers, compression 0.5, no dropout, NHWC inputs. `DenseNet((16, 16, 16), rngs=rngs)` is the
        one of depth 100 with 769,162 parameters.

    References:
        Huang et al. 2016 (arXiv 1608.06993), section 3; the counts are those of pytorchcv.
    """
    return DenseNet((6, 6, 6), classes=classes, rngs=rngs)
