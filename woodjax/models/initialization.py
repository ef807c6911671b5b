"""PyTorch's default initial weights, which studies of pruning at initialization start from."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

LAYERS = (nnx.Linear, nnx.Conv)


def torch_init(model: nnx.Module, rngs: nnx.Rngs) -> None:
    """Redraw the kernels and biases of a model as PyTorch's `Linear` and `Conv2d` draw theirs.

    Both are uniform on `±1/√fan_in`. Flax draws kernels from a truncated normal distribution of variance `1/fan_in`,
    three times as much, and zeros as biases. Without normalisation, or with untrained batch normalisation in eval
    mode, activations then fade by about 0.41 in each ReLU layer with PyTorch's and by 0.71 with Flax's, which
    criteria at initialization see.

    Args:
        model: A module, changed in place. Only `nnx.Linear` and `nnx.Conv` (grouped ones too) are drawn anew:
            normalisation, embeddings and class tokens stay as they are.
        rngs: Random numbers, those of its stream `params`.

    Raises:
        ValueError: A layer of another kind that has a kernel.

    Cost:
        One pass over the parameters.

    References:
        He et al. 2015 (arXiv 1502.01852), with the slope `a = √5` that PyTorch passes to `kaiming_uniform_`.

    Example:
        >>> from flax import nnx
        >>> from woodjax.models import mlpnet, torch_init
        >>> model = mlpnet(nnx.Rngs(0))
        >>> torch_init(model, nnx.Rngs(1))
        >>> bool(abs(model.fc1.kernel[...]).max() <= 784**-0.5)
        True
    """
    layers = [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]
    for path, layer in layers:
        if isinstance(getattr(layer, "kernel", None), nnx.Param) and not isinstance(layer, LAYERS):
            name = "/".join(map(str, path))
            raise ValueError(
                f"Layer '{name}' is a {type(layer).__name__}: torch_init knows nnx.Linear and nnx.Conv. "
                "Draw such layers yourself."
            )
    drawn: list[tuple[nnx.Param, float]] = []
    for _, layer in layers:
        if isinstance(layer, LAYERS):
            bound = 1 / math.sqrt(math.prod(layer.kernel.shape[:-1]))
            drawn += [(x, bound) for x in (layer.kernel, layer.bias) if x is not None]
    # One draw for all: random numbers are compiled anew for every shape.
    ends = np.cumsum([parameter.size for parameter, _ in drawn])
    numbers = jax.random.uniform(rngs.params(), (ends[-1],) if drawn else (0,), minval=-1, maxval=1)
    for (parameter, bound), part in zip(drawn, jnp.split(numbers, ends[:-1]), strict=True):
        parameter[...] = (bound * part).reshape(parameter.shape).astype(parameter.dtype)
