"""U-Net (Ronneberger et al. 2015, arXiv 1505.04597) with batch normalisation, for a class of every pixel."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from woodjax.models.layers import conv3


class DoubleConvolution(nnx.Module):
    """A 3×3 convolution, batch normalisation and ReLU, twice."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs) -> None:
        """Build the layers.

        Args:
            inputs: Channels in.
            outputs: Channels out.
            rngs: Random numbers for the initial weights.
        """
        self.conv1: nnx.Conv = conv3(inputs, outputs, 1, rngs)
        self.bn1: nnx.BatchNorm = nnx.BatchNorm(outputs, rngs=rngs)
        self.conv2: nnx.Conv = conv3(outputs, outputs, 1, rngs)
        self.bn2: nnx.BatchNorm = nnx.BatchNorm(outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c2"]:
        """Apply the layers to a batch."""
        x = jax.nn.relu(self.bn1(self.conv1(x)))
        return jax.nn.relu(self.bn2(self.conv2(x)))


class Up(nnx.Module):
    """A transposed 2×2 convolution that doubles the image, joined behind a skip, and a double convolution."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs) -> None:
        """Build the layers.

        Args:
            inputs: Channels of the small image.
            outputs: Channels of the skip, and out.
            rngs: Random numbers for the initial weights.
        """
        self.up: nnx.ConvTranspose = nnx.ConvTranspose(
            inputs, outputs, (2, 2), strides=(2, 2), padding="VALID", rngs=rngs
        )
        self.convolutions: DoubleConvolution = DoubleConvolution(2 * outputs, outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"], skip: Float[Array, "n h2 w2 c2"]) -> Float[Array, "n h2 w2 c2"]:
        """Apply the layers to a batch."""
        return self.convolutions(jnp.concatenate([skip, self.up(x)], axis=-1))


class UNet(nnx.Module):
    """Double convolutions with max-pools between them, the way back up with skips, and a 1×1 convolution."""

    def __init__(self, widths: Sequence[int], *, classes: int = 10, rngs: nnx.Rngs) -> None:
        """Build the network.

        Args:
            widths: Channels at each size of the image, from the largest to the smallest.
            classes: Number of logits of a pixel.
            rngs: Random numbers for the initial weights.
        """
        self.levels: int = len(widths) - 1
        inputs = 3
        for i, width in enumerate(widths):
            setattr(self, f"down{i}", DoubleConvolution(inputs, width, rngs=rngs))
            inputs = width
        for i in reversed(range(self.levels)):
            setattr(self, f"up{i}", Up(widths[i + 1], widths[i], rngs=rngs))
        self.head: nnx.Conv = nnx.Conv(widths[0], classes, (1, 1), rngs=rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n h w classes"]:
        """Logits of every pixel of a batch of NHWC images, whose height and width the max-pools must divide."""
        factor = 2**self.levels
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"Images of shape {x.shape[1:]} do not divide by the {self.levels} max-pools of 2×2: height and width "
                f"must be multiples of {factor}."
            )
        skips = []
        for i in range(self.levels):
            skips.append(getattr(self, f"down{i}")(x))
            x = nnx.max_pool(skips[-1], (2, 2), strides=(2, 2))
        x = getattr(self, f"down{self.levels}")(x)
        for i in reversed(range(self.levels)):
            x = getattr(self, f"up{i}")(x, skips[i])
        return self.head(x)


def unet_nano(rngs: nnx.Rngs, *, classes: int = 10) -> UNet:
    """A U-Net of three sizes with 8, 16 and 32 channels: 29,706 parameters with 10 classes.

    Args:
        rngs: Random numbers for the initial weights.
        classes: Number of logits of a pixel.

    Returns:
        A network that trains on two cores in minutes, NHWC inputs whose sides are multiples of 4, and one vector of
        logits for every pixel.

    References:
        Ronneberger et al. 2015 (arXiv 1505.04597), figure 1; convolutions pad, so that the image keeps its size, and
        have batch normalisation.
    """
    return UNet((8, 16, 32), classes=classes, rngs=rngs)
