"""Random crops and flips of a batch, compiled."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, Shaped


@partial(jax.jit, static_argnames=("padding", "flip"))
def augment(
    key: Key[Array, ""], images: Shaped[Array, "n h w c"], *, padding: int = 4, flip: bool = True
) -> Shaped[Array, "n h w c"]:
    """Random crop of the zero-padded images, and a horizontal flip of half of them.

    Zero is black for bytes, before they are normalised, and the mean pixel for normalised images.

    Args:
        key: Decides all.
        images: `[n, h, w, c]` of any dtype.
        padding: Pixels added on each side: `(2·padding + 1)²` windows, equally likely.
        flip: Whether to flip, with probability 1/2.

    Returns:
        Like `images`.

    Raises:
        ValueError: `padding` below 0; not four axes.

    Cost:
        One copy of the padded images and one gather.

    References:
        He et al. 2015 (arXiv 1512.03385), section 4.2.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from woodjax.datasets import augment
        >>> images = jnp.arange(16, dtype=jnp.uint8).reshape(1, 4, 4, 1)
        >>> augment(jax.random.key(0), images, padding=1).shape
        (1, 4, 4, 1)
    """
    if padding < 0 or images.ndim != 4:
        raise ValueError(
            f"Found padding={padding} and images of shape {images.shape}: pass padding >= 0 and images [n, h, w, c]."
        )
    count, height, width, channels = images.shape
    crop_key, flip_key = jax.random.split(key)
    if padding:
        sides = (padding, padding)
        padded = jnp.pad(images, ((0, 0), sides, sides, (0, 0)))
        offsets = jax.random.randint(crop_key, (count, 2), 0, 2 * padding + 1)
        corners = jnp.pad(offsets, ((0, 0), (0, 1)))
        images = jax.vmap(partial(_crop, size=(height, width, channels)))(padded, corners)
    if not flip:
        return images
    flipped = jax.random.bernoulli(flip_key, shape=(count, 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


def _crop(
    image: Shaped[Array, "H W c"], corner: Int[Array, "3"], *, size: tuple[int, int, int]
) -> Shaped[Array, "h w c"]:
    return jax.lax.dynamic_slice(image, corner, size)
