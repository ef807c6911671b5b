"""Second moments of what the kernels of one layer read, a micro-batch at a time."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Sharding
from jaxtyping import Array, Float

from woodjax import linalg
from woodjax.layerwise.kernels import KernelView, run_recorded
from woodjax.layerwise.layers import Hidden, LayerFn
from woodjax.tree import Layout, wide_dtype
from woodjax.typing import Params

Moments = dict[str, Float[Array, "groups in ..."]]  # by the path of the kernel, [groups, in, in] or [groups, in]
Weights = dict[str, Float[Array, "rows groups"]]  # by the path of the kernel


def empty_moments(
    params: Params,
    layout: Layout,
    views: dict[str, KernelView],
    groups: dict[str, int],
    *,
    diagonal: bool,
    device: Sharding | None,
) -> Moments:
    """Sums before any data.

    Args:
        params: The parameters of the layer.
        layout: Which leaves are selected.
        views: From `find_kernels`.
        groups: How many moments each kernel has.
        diagonal: Only the diagonals.
        device: Where; None for the default device.

    Returns:
        Zeros, at least float32.

    Cost:
        `groups · in²` floats for each kernel, or `groups · in`.
    """
    moments: Moments = {}
    dtype = wide_dtype(params)
    for spec in layout.selected:
        inputs, _ = views[spec.path].matrix_shape(spec.shape)
        shape = (groups[spec.path], inputs) + (() if diagonal else (inputs,))
        moments[spec.path] = jnp.zeros(shape, dtype, device=device)
    return moments


@partial(jax.jit, static_argnames=("layout", "diagonal"), donate_argnames=("moments",))
def add_moments(
    function: LayerFn,
    params: Params,
    hidden: Hidden,
    weights: Weights | None,
    moments: Moments,
    *,
    layout: Layout,
    diagonal: bool,
) -> Moments:
    """`Σ s x xᵀ` over the rows that each kernel reads, `s` the weight of the row or 1.

    Args:
        function: A `jax.tree_util.Partial`.
        params: The parameters.
        hidden: What comes in.
        weights: Of each row, for each group of output units; None for 1.
        moments: The sums so far; given away.
        layout: Which leaves are selected.
        diagonal: Only the diagonals.

    Returns:
        The new sums.

    Cost:
        The layer, and `2 · rows · groups · in²` flops for each kernel.
    """
    inputs = run_recorded(function, params, hidden, layout).inputs
    found: Moments = {}
    for path, total in moments.items():
        x = inputs[path].astype(total.dtype)
        scales = None if weights is None else jnp.sqrt(weights[path]).astype(total.dtype).T
        found[path] = total + (_squares(x, scales) if diagonal else _products(x, scales))
    return found


@jax.jit
def advance(function: LayerFn, params: Params, hidden: Hidden) -> Hidden:
    """What the layer makes of a micro-batch.

    Args:
        function: A `jax.tree_util.Partial`.
        params: The parameters.
        hidden: What comes in.

    Returns:
        What goes out.
    """
    return function(params, hidden)


def _products(x: Float[Array, "rows in"], scales: Float[Array, "groups rows"] | None) -> Float[Array, "groups in in"]:
    if scales is None:
        return linalg.contract("ri,rj->ij", x, x)[None]

    def one(scale: Array) -> Array:
        scaled = x * scale[:, None]
        return linalg.contract("ri,rj->ij", scaled, scaled)

    return lax.map(one, scales)


def _squares(x: Float[Array, "rows in"], scales: Float[Array, "groups rows"] | None) -> Float[Array, "groups in"]:
    if scales is None:
        return jnp.sum(jnp.square(x), axis=0)[None]
    return linalg.contract("gr,ri->gi", jnp.square(scales), jnp.square(x))
