"""One weight at a time: the greedy order of removals inside a dense block."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


@jax.jit
def greedy_trace(
    inverse: Float[Array, "b b"], weights: Float[Array, " b"], tiers: Int[Array, " b"]
) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
    """Remove the weight of least loss, move the others, downdate the inverse; until none is left.

    After the removal of `q` the inverse of the Hessian of the rest is `H⁻¹ − H⁻¹_{:q}H⁻¹_{q:}/[H⁻¹]_qq`.

    Args:
        inverse: `H⁻¹ [b, b]`.
        weights: `w [b]`.
        tiers: 0 goes before all others, 1 is ranked by loss, 2 takes no part.

    Returns:
        The coordinates in the order in which they go, `−1` where none is left, and the loss of each removal. A
        diagonal that cancellation has brought below the rounding error of its first value is held there: such
        weights are those to keep, and their order among themselves is approximate.

    Cost:
        `4b³` flops; one copy of the inverse.

    References:
        Frantar & Alistarh, OBC, 2022 (arXiv 2208.11580), algorithm 1 and lemma 1.
    """
    b = weights.shape[0]
    dtype = jnp.result_type(inverse, weights)
    inverse, weights = inverse.astype(dtype), weights.astype(dtype)
    least = jnp.finfo(inverse.dtype).eps * jnp.diagonal(inverse)

    def remove(state: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
        inverse, weights, tiers = state
        diagonal = jnp.maximum(jnp.diagonal(inverse), least)
        losses = weights**2 / (2 * diagonal)
        q = jnp.argmin(jnp.where(tiers == 0, -1, jnp.where(tiers == 1, losses, jnp.inf)))
        some = tiers[q] < 2
        gone = tiers.at[q].set(2)
        column = jnp.where(gone < 2, inverse[:, q], 0)
        ratio = column / diagonal[q]
        moved = jnp.where(gone < 2, weights - weights[q] * ratio, 0)
        following = (inverse - column[:, None] * ratio, moved, gone)  # nothing changes where none was left
        return following, (jnp.where(some, q, -1), jnp.where(some, losses[q], 0))

    _, (order, losses) = lax.scan(remove, (inverse, weights, tiers), None, length=b)
    return order, losses
