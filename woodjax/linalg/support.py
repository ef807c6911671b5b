"""The quadratic model with a given support: its minimum, and what each exchange of weights is worth.

With `c = w − ḡ/λ` the model is a ridge regression around `c`. At its minimum on the support `K`, with `A` the
gradients of the survivors, `mλI + AAᵀ = LLᵀ` and `u` the dual solution, one vector `v = c + Gᵀu` and the leverages
`h_q = ‖L⁻¹g_q‖²` say everything:

| | |
|---|---|
| value of a survivor | `v_i` |
| cost of removing it, the others moving along | `½λ v_i²/(1 − h_i)` |
| gain of bringing back a pruned weight | `½λ v_j²/(1 + h_j)` |
| cost of removing it once `j` is back | the first with `v_i − c_ij v_j/(1 + h_j)` and `1 − h_i + c_ij²/(1 + h_j)` |

where `c_ij = g_iᵀ(LLᵀ)⁻¹g_j`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from woodjax.linalg.dual import Whitener, solve_whitened, whiten
from woodjax.linalg.guards import least_diagonal
from woodjax.linalg.products import COLUMN_WINDOW, contract, leverage, lower_gram, mirror, window


class Support(NamedTuple):
    """The minimum of the quadratic model on a support."""

    value: Float[Array, ""]  # ḡᵀδ + ½δᵀHδ, measured at the step with the damping as asked
    pull: Float[Array, " b"]  # v: the survivors' values, and what pulls at each pruned weight
    whitener: Whitener  # of the survivors' Gram matrix


@jax.jit
def survivor_gram(gradients: Float[Array, "m b"], kept: Bool[Array, " b"]) -> Float[Array, "m m"]:
    """Gram matrix of the columns that are kept, gathered so that the others cost nothing.

    Args:
        gradients: Per-example gradients `G [m, b]`.
        kept: Columns that count.

    Returns:
        `AAᵀ [m, m]`, symmetric.

    Cost:
        About `1.25m²k` flops for `k` columns kept; workspace `m · min(b, 4096)` and `2m²`.
    """
    m, b = gradients.shape
    width = min(b, COLUMN_WINDOW)
    order = jnp.argsort(~kept, stable=True)
    count = jnp.sum(kept)

    def add(state: tuple[Array, Array]) -> tuple[Array, Array]:
        total, start = state
        first = jnp.minimum(start, b - width)
        place = first + jnp.arange(width)
        columns = jnp.take(gradients, lax.dynamic_slice_in_dim(order, first, width), axis=1)
        return total + lower_gram(jnp.where((place >= start) & (place < count), columns, 0)), start + width

    lower = jnp.zeros((m, m), jnp.promote_types(gradients.dtype, jnp.float32))
    return mirror(lax.while_loop(lambda state: state[1] < count, add, (lower, jnp.zeros((), count.dtype)))[0])


@jax.jit
def solve_support(
    gradients: Float[Array, "m b"],
    damping: Float[Array, ""] | float,
    weights: Float[Array, " b"],
    kept: Bool[Array, " b"],
    gradient: Float[Array, " b"] | None = None,
) -> Support:
    """Minimise the quadratic model on a support, as `joint_step_gram` does, and keep what exchanges need.

    Args:
        gradients: Per-example gradients `G [m, b]`.
        damping: `λ > 0`.
        weights: `w [b]`.
        kept: True on `K`.
        gradient: `ḡ [b]`, the first-order term; None for a network at a minimum.

    Returns:
        The minimum.

    Cost:
        About `1.25m²k + 2m³/3 + 8mb` flops for `k` weights kept.

    References:
        Benbaki et al., CHITA, 2023 (arXiv 2302.14623), section 3.
    """
    whitener = whiten(survivor_gram(gradients, kept), damping)
    newton = jnp.zeros_like(weights) if gradient is None else gradient / whitener.damping
    dual = solve_whitened(whitener, contract("mb,b->m", gradients, jnp.where(kept, newton, weights)))
    shift = contract("mb,m->b", gradients, dual) - newton
    value = quadratic(gradients, damping, jnp.where(kept, shift, -weights), gradient)
    return Support(value, weights + shift, whitener)


@jax.jit
def quadratic(
    gradients: Float[Array, "m b"],
    damping: Float[Array, ""] | float,
    step: Float[Array, " b"],
    gradient: Float[Array, " b"] | None = None,
) -> Float[Array, ""]:
    """`ḡᵀδ + ½λ‖δ‖² + ‖Gδ‖²/2m`: without cancellation where there is no gradient.

    Args:
        gradients: Per-example gradients `G [m, b]`.
        damping: `λ`.
        step: `δ [b]`.
        gradient: `ḡ [b]`, or None.

    Returns:
        A scalar in units of the loss.

    Cost:
        `2mb` flops.
    """
    along = contract("mb,b->m", gradients, step)
    value = 0.5 * (damping * contract("b,b->", step, step) + contract("m,m->", along, along) / gradients.shape[0])
    return value if gradient is None else value + contract("b,b->", gradient, step)


@jax.jit
def exchange_scales(gradients: Float[Array, "m b"], whitener: Whitener, kept: Bool[Array, " b"]) -> Float[Array, " b"]:
    """`1 − h_q` of survivors and `1 + h_q` of pruned weights, a window of columns at a time.

    Args:
        gradients: Per-example gradients `G [m, b]`.
        whitener: Of the survivors' Gram matrix.
        kept: True on `K`.

    Returns:
        `[b]`; a survivor's is at least the `λ/H_qq` that exact arithmetic promises.

    Cost:
        About `1.25m²b` flops; workspace `m · min(b, 4096)`.
    """
    b = gradients.shape[1]
    width = min(b, COLUMN_WINDOW)
    firsts = jnp.arange(0, b, width)
    starts = jnp.minimum(firsts, b - width)  # the last window overlaps the one before, with the same values

    def scales(first: Array) -> Array:
        columns = window(gradients, first, width)[0]
        inside = lax.dynamic_slice_in_dim(kept, jnp.minimum(first, b - width), width)
        h = leverage(whitener.root, columns)
        least = whitener.damping * least_diagonal(columns, whitener.damping)
        return jnp.where(inside, jnp.maximum(1 - h, least), 1 + h)

    parts = lax.map(scales, firsts)
    return jnp.zeros(b, parts.dtype).at[starts[:, None] + jnp.arange(width)].set(parts)
