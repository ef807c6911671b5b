"""Networks whose numbers are drawn by NumPy: initialising one compiles for seconds what a test does not look at."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def built(make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    """A network with normal kernels, scales and variances of one, and zeros elsewhere."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if leaf.ndim >= 2:
            values = rng.standard_normal(leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]))
        else:
            values = np.full(leaf.shape, float(any(word in jax.tree_util.keystr(path) for word in ("scale", "var"))))
        return jnp.asarray(values, leaf.dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))
