"""Fully connected networks."""

from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float


class MLP(nnx.Module):
    """ReLU network `fc1, fc2, …`; inputs of any shape are flattened."""

    def __init__(self, features: Sequence[int], *, use_bias: bool = True, rngs: nnx.Rngs) -> None:
        """Build the layers.

        Args:
            features: Widths from input to logits.
            use_bias: Give every layer a bias.
            rngs: Random numbers for the initial weights.
        """
        self.depth: int = len(features) - 1
        for i in range(self.depth):
            layer = nnx.Linear(features[i], features[i + 1], use_bias=use_bias, rngs=rngs)
            setattr(self, f"fc{i + 1}", layer)

    def __call__(self, x: Float[Array, "n ..."]) -> Float[Array, "n classes"]:
        """Logits of a batch."""
        x = x.reshape(x.shape[0], -1)
        for i in range(1, self.depth):
            x = jax.nn.relu(getattr(self, f"fc{i}")(x))
        return getattr(self, f"fc{self.depth}")(x)


def mlpnet(rngs: nnx.Rngs) -> MLP:
    """MLPNet for MNIST: 784-40-20-10 without biases, 32,360 weights.

    Args:
        rngs: Random numbers for the initial weights.

    Returns:
        The network of the one-shot tables of WoodFisher, CBS and CHITA.

    References:
        Singh & Alistarh, WoodFisher, 2020 (arXiv 2004.14340), section 5.
    """
    return MLP((784, 40, 20, 10), use_bias=False, rngs=rngs)


def lenet_300_100(rngs: nnx.Rngs) -> MLP:
    """LeNet-300-100 for MNIST: 784-300-100-10, 266,200 weights and 410 biases.

    Args:
        rngs: Random numbers for the initial weights.

    Returns:
        The network that gradual pruning is most often tried on first.

    References:
        LeCun et al., Gradient-based learning applied to document recognition, 1998, section III.C.
    """
    return MLP((784, 300, 100, 10), rngs=rngs)


def digits_mlp(rngs: nnx.Rngs) -> MLP:
    """A network for the 8×8 UCI digits: 64-64-32-10, 6,464 weights and 106 biases.

    Args:
        rngs: Random numbers for the initial weights.

    Returns:
        A network that trains in seconds.
    """
    return MLP((64, 64, 32, 10), rngs=rngs)
