"""Vision transformers (Dosovitskiy et al. 2020, arXiv 2010.11929)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from woodjax.models.layers import Stem, check_stem

MLP_RATIO = 4


class EncoderBlock(nnx.Module):
    """Self-attention and two dense layers, each behind a layer normalisation and beside a residual stream."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        """Build the block.

        Args:
            width: Of the stream.
            heads: Of the attention; they divide the width.
            rngs: Random numbers for the initial weights.
        """
        self.heads = heads
        self.norm1: nnx.LayerNorm = nnx.LayerNorm(width, rngs=rngs)
        self.qkv: nnx.Linear = nnx.Linear(width, 3 * width, rngs=rngs)
        self.projection: nnx.Linear = nnx.Linear(width, width, rngs=rngs)
        self.norm2: nnx.LayerNorm = nnx.LayerNorm(width, rngs=rngs)
        self.fc1: nnx.Linear = nnx.Linear(width, MLP_RATIO * width, rngs=rngs)
        self.fc2: nnx.Linear = nnx.Linear(MLP_RATIO * width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "n tokens width"]) -> Float[Array, "n tokens width"]:
        """Apply the block to a batch."""
        split = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3, self.heads, -1)
        attended = jax.nn.dot_product_attention(split[:, :, 0], split[:, :, 1], split[:, :, 2])
        x = x + self.projection(attended.reshape(x.shape))
        return x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False))


class ViT(nnx.Module):
    """Patches, a class token and learned positions, blocks, layer normalisation, and one linear layer."""

    def __init__(
        self, *, image_size: int, patch: int, width: int, depth: int, heads: int, classes: int = 10, rngs: nnx.Rngs
    ) -> None:
        """Build the network.

        Args:
            image_size: Height and width of the images.
            patch: Height and width of a patch.
            width: Of the residual stream.
            depth: Number of blocks.
            heads: Of the attention.
            classes: Number of logits.
            rngs: Random numbers for the initial weights.

        Raises:
            ValueError: Patches that do not divide the image, or heads that do not divide the width.
        """
        if image_size % patch or width % heads:
            raise ValueError(
                f"image_size={image_size}, patch={patch}, width={width}, heads={heads}: patches must divide the image, "
                "and heads the width."
            )
        self.image_size: int = image_size
        self.depth: int = depth
        self.patches: nnx.Conv = nnx.Conv(3, width, (patch, patch), strides=patch, padding="VALID", rngs=rngs)
        self.token: nnx.Param[Any] = nnx.Param(jnp.zeros((1, 1, width)))
        tokens = (image_size // patch) ** 2 + 1
        self.positions: nnx.Param[Any] = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, tokens, width)))
        for i in range(depth):
            setattr(self, f"blocks_{i}", EncoderBlock(width, heads, rngs=rngs))
        self.norm: nnx.LayerNorm = nnx.LayerNorm(width, rngs=rngs)
        self.linear: nnx.Linear = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        """Logits of a batch of NHWC images of the size that the network was made for."""
        if x.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"Images of shape {x.shape[1:]}: this network has positions for {self.image_size}×{self.image_size}."
            )
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = jnp.concatenate([jnp.broadcast_to(self.token[...], (x.shape[0], 1, x.shape[-1])), x], axis=1)
        x = x + self.positions[...]
        for i in range(self.depth):
            x = getattr(self, f"blocks_{i}")(x)
        return self.linear(self.norm(x)[:, 0])


def vit_tiny(rngs: nnx.Rngs, *, classes: int = 10, stem: Stem = "cifar") -> ViT:
    """ViT-Ti: 5,717,416 parameters for ImageNet, fewer with the patches for CIFAR.

    Args:
        rngs: Random numbers for the initial weights.
        classes: Number of logits.
        stem: Patches of 4×4 in images of 32×32 (`"cifar"`), or of 16×16 in images of 224×224 (`"imagenet"`).

    Returns:
        Twelve blocks of width 192 with three heads, NHWC inputs.

    References:
        Touvron et al. 2020, DeiT (arXiv 2012.12877), table 1; Dosovitskiy et al. 2020 (arXiv 2010.11929).
    """
    check_stem(stem)
    image_size, patch = (32, 4) if stem == "cifar" else (224, 16)
    return ViT(image_size=image_size, patch=patch, width=192, depth=12, heads=3, classes=classes, rngs=rngs)


def vit_nano(rngs: nnx.Rngs, *, classes: int = 10, image_size: int = 32) -> ViT:
    """A ViT with four blocks of width 64, four heads and patches of 4×4.

    Args:
        rngs: Random numbers for the initial weights.
        classes: Number of logits.
        image_size: Height and width of the images, a multiple of 4.

    Returns:
        A network that trains on two cores in minutes, NHWC inputs.
    """
    return ViT(image_size=image_size, patch=4, width=64, depth=4, heads=4, classes=classes, rngs=rngs)
