"""What the quadratic model predicts along a path of nested masks, from one pass over the gradients."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from woodjax.linalg.dual import solve_whitened, whiten
from woodjax.linalg.products import COLUMN_WINDOW, contract, lower_gram, mirror, total_over


@partial(jax.jit, static_argnames=("num_levels", "axes"))
def path_losses(
    gradients: Float[Array, "m b"],
    damping: Float[Array, ""] | float,
    weights: Float[Array, " b"],
    levels: Int[Array, " b"],
    *,
    num_levels: int,
    axes: tuple[str, ...] = (),
) -> Float[Array, " num_levels"]:
    """Loss change that the quadratic model predicts for the joint step at every level of a path.

    At level `l` the weights with `levels <= l` are gone. With `r = G_Q w_Q` and `A` the survivors'
    columns the minimum is `½λ(‖w_Q‖² + rᵀ(mλI + AAᵀ)⁻¹r)`; from the last level back to the first `AAᵀ`
    only gains columns.

    Args:
        gradients: Per-example gradients `G [m, b]`.
        damping: `λ > 0`.
        weights: `w [b]`.
        levels: First level at which a weight is gone; `num_levels` or more: never.
        num_levels: Levels of the path, `L`.
        axes: As in `gram`.

    Returns:
        `[L]`, in units of the loss, first-order term left out.

    Cost:
        `m²(b + 256L) + 2mbL + L·2m³/3` flops at most, where `L` joint steps would take `m²b` each; workspace
        `m · min(b, 4096)`, `4m²` and `L·m`.

    References:
        The minimum of the ridge problem of Benbaki et al., CHITA, 2023 (arXiv 2302.14623), section 3.
    """
    m, b = gradients.shape
    dtype = jnp.promote_types(gradients.dtype, jnp.float32)
    width = min(b, COLUMN_WINDOW, max(256, -(-b // num_levels)))  # a level takes at least one window
    order = jnp.argsort(-levels, stable=True)  # survivors of everything first
    gone = jnp.sum(levels[:, None] <= jnp.arange(num_levels), axis=0)

    def columns(start: Array, end: Array) -> tuple[Array, Array]:
        """A window of columns in that order; those at or after `end` are zero."""
        first = jnp.minimum(start, b - width)
        index = lax.dynamic_slice_in_dim(order, first, width)
        place = first + jnp.arange(width)
        inside = (place >= start) & (place < end)
        return jnp.where(inside, jnp.take(gradients, index, axis=1), 0), index

    def residual_of(start: Array) -> Array:
        window, index = columns(start, jnp.asarray(b))
        pruned = levels[index][:, None] <= jnp.arange(num_levels)
        return contract("mw,wl->lm", window, jnp.where(pruned, weights[index][:, None], 0))

    residuals = lax.scan(
        lambda total, start: (total + residual_of(start), None),
        jnp.zeros((num_levels, m), jnp.promote_types(dtype, weights.dtype)),
        jnp.arange(0, b, width),
    )[0]
    residuals = total_over(residuals, axes)

    def level(state: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], Array]:
        lower, done = state
        survivors = b - gone[number]

        def add(state: tuple[Array, Array]) -> tuple[Array, Array]:
            total, start = state
            return total + lower_gram(columns(start, survivors)[0]), start + width

        lower, _ = lax.while_loop(lambda state: state[1] < survivors, add, (lower, done))
        residual = residuals[number]
        whitener = whiten(total_over(mirror(lower), axes), damping)
        along = contract("m,m->", residual, solve_whitened(whitener, residual))
        return (lower, survivors), whitener.damping * along

    descending = jnp.arange(num_levels - 1, -1, -1)
    start = jnp.zeros((m, m), dtype), jnp.asarray(0)
    along = lax.scan(level, start, descending)[1][::-1]
    squares = jnp.sum(jnp.where(levels[:, None] <= jnp.arange(num_levels), (weights**2)[:, None], 0), axis=0)
    return 0.5 * (jnp.asarray(damping) * total_over(squares, axes) + along)
