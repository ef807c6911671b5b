"""What the convolutional networks share."""

from typing import Literal, TypeAlias

from flax import nnx

Stem: TypeAlias = Literal["cifar", "imagenet"]
PADDING = ((1, 1), (1, 1))  # "SAME" would pad strided convolutions on one side only


def conv3(inputs: int, outputs: int, stride: int, rngs: nnx.Rngs, *, groups: int = 1) -> nnx.Conv:
    """A 3×3 convolution without a bias.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        stride: Of both axes.
        rngs: Random numbers for the initial weights.
        groups: Groups of channels that do not mix.

    Returns:
        The layer.
    """
    return nnx.Conv(
        inputs, outputs, (3, 3), strides=stride, padding=PADDING, feature_group_count=groups, use_bias=False, rngs=rngs
    )


def conv1(inputs: int, outputs: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    """A 1×1 convolution without a bias.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        stride: Of both axes.
        rngs: Random numbers for the initial weights.

    Returns:
        The layer.
    """
    return nnx.Conv(inputs, outputs, (1, 1), strides=stride, use_bias=False, rngs=rngs)


def check_stem(stem: str) -> None:
    """Raise unless a stem is known.

    Args:
        stem: Name of the first layers: `"cifar"` for images of 32×32, `"imagenet"` for images of 224×224.

    Raises:
        ValueError: Another name.
    """
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f"stem is {stem!r}: choose 'cifar' or 'imagenet'.")
