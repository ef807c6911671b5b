"""VGG networks with batch normalisation for small images (Simonyan & Zisserman, arXiv 1409.1556, table 1)."""

from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float

from woodjax.models.layers import PADDING

POOL = "M"
VGG11 = (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)
VGG16 = (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512, POOL)
SLIM = (16, 16, POOL, 32, 32, POOL, 64, 64, POOL, 64, 64, POOL)


class VGG(nnx.Module):
    """3×3 convolutions `conv1, conv2, …` with biases and batch normalisation, 2×2 max-pools, and one linear layer."""

    def __init__(self, plan: Sequence[int | str], *, classes: int = 10, rngs: nnx.Rngs) -> None:
        """Build the layers.

        Args:
            plan: Channels of the convolutions, and `"M"` for a max-pool.
            classes: Number of logits.
            rngs: Random numbers for the initial weights.
        """
        self.plan: tuple[int | str, ...] = tuple(plan)
        inputs = 3
        widths = [width for width in self.plan if isinstance(width, int)]
        for i, outputs in enumerate(widths, start=1):
            # Useless in front of batch normalisation, but there in the networks that the literature prunes.
            setattr(self, f"conv{i}", nnx.Conv(inputs, outputs, (3, 3), padding=PADDING, rngs=rngs))
            setattr(self, f"bn{i}", nnx.BatchNorm(outputs, rngs=rngs))
            inputs = outputs
        self.linear: nnx.Linear = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        """Logits of a batch of NHWC images, whose height and width the max-pools must divide."""
        shape, i = x.shape, 0
        for width in self.plan:
            if width == POOL:
                if x.shape[1] % 2 or x.shape[2] % 2:
                    raise ValueError(
                        f"Images of shape {shape[1:]} do not divide by the {self.plan.count(POOL)} max-pools of 2×2: "
                        f"height and width must be multiples of {2 ** self.plan.count(POOL)}."
                    )
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
            else:
                i += 1
                x = jax.nn.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        return self.linear(x.mean(axis=(1, 2)))


def vgg11_bn(rngs: nnx.Rngs, *, classes: int = 10) -> VGG:
    """VGG-11-BN for CIFAR: 9,231,114 parameters with 10 classes, for images of 32×32.

    Args:
        rngs: Random numbers for the initial weights.
        classes: Number of logits.

    Returns:
        Configuration A with one linear layer, NHWC inputs.

    References:
        Simonyan & Zisserman 2014 (arXiv 1409.1556), table 1; with batch normalisation and one linear layer as in
        kuangliu/pytorch-cifar.
    """
    return VGG(VGG11, classes=classes, rngs=rngs)


def vgg16_bn(rngs: nnx.Rngs, *, classes: int = 10) -> VGG:
    """VGG-16-BN for CIFAR: 14,728,266 parameters with 10 classes, for images of 32×32.

    Args:
        rngs: Random numbers for the initial weights.
        classes: Number of logits.

    Returns:
        Configuration D with one linear layer, NHWC inputs.

    References:
        As `vgg11_bn`; Tanaka et al. 2020 (arXiv 2006.05467) prune it at initialization.
    """
    return VGG(VGG16, classes=classes, rngs=rngs)


def vgg_slim(rngs: nnx.Rngs, *, classes: int = 10) -> VGG:
    """A VGG with eight narrow convolutions: 145,584 weights in them, for images of 16×16 or 32×32.

    Args:
        rngs: Random numbers for the initial weights.
        classes: Number of logits.

    Returns:
        A network that trains on two cores in minutes, NHWC inputs.
    """
    return VGG(SLIM, classes=classes, rngs=rngs)
