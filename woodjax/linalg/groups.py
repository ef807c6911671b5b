"""Groups of weights: what it costs to remove them together, exactly.

With `B = [H⁻¹]_QQ` the joint cost of a group is `½ t_Qᵀ B⁻¹ t_Q`. Eliminating one weight after another from `B` and
`t` gives it as a sum of single costs, `Σ t_i²/(2B_ii)`, each taken after the weights before have gone and the others
have moved: that is exact for a whole group, and greedy where the cheapest goes first.
"""

import math
from functools import partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from woodjax.linalg.dense import solve_cholesky
from woodjax.linalg.dual import Whitener
from woodjax.linalg.guards import least_diagonal
from woodjax.linalg.products import contract, row_panels

ELIMINATED = 16  # weights of a group up to which elimination in all groups at once beats a factor of each
MAX_SUBSETS = 70  # those of 4:8; beyond, subsets are grown greedily


def eliminate(
    inverse: Float[Array, "*n q q"], target: Float[Array, "*n q"]
) -> tuple[Float[Array, "*n q"], Float[Array, "*n q"]]:
    """Remove the weights of a group in their order.

    Args:
        inverse: `[H⁻¹]_QQ`.
        target: `t_Q`, the weights, or `w − H⁻¹ḡ` with a first-order term.

    Returns:
        The pivots, what is left of each diagonal entry when its turn comes, and the costs of the single removals.

    Cost:
        `2q³/3` flops a group, elementwise: no LAPACK call.
    """
    pivots, costs = [], []
    for _ in range(target.shape[-1]):
        pivot, row, value = inverse[..., 0, 0], inverse[..., 0, 1:], target[..., 0]
        ratio = row / pivot[..., None]
        pivots.append(pivot)
        costs.append(value**2 / (2 * pivot))
        target = target[..., 1:] - ratio * value[..., None]
        inverse = inverse[..., 1:, 1:] - ratio[..., :, None] * row[..., None, :]
    return jnp.stack(pivots, axis=-1), jnp.stack(costs, axis=-1)


@jax.jit
def group_cost(inverse: Float[Array, "q q"], target: Float[Array, " q"]) -> Float[Array, ""]:
    """Joint cost of one group: `½ tᵀ([H⁻¹]_QQ)⁻¹t`.

    Args:
        inverse: `[H⁻¹]_QQ`.
        target: `t_Q`.

    Returns:
        In units of the loss; NaN where the matrix is not positive definite.

    Cost:
        `q³/3` flops.

    References:
        Kurtić et al., oBERT, 2022 (arXiv 2203.07259), section 3.
    """
    if target.shape[0] > ELIMINATED:
        return 0.5 * contract("q,q->", target, solve_cholesky(inverse, target))
    pivots, costs = eliminate(inverse, target)
    return jnp.where(jnp.all(pivots > 0), jnp.sum(costs), jnp.nan)


def dual_submatrices(columns: Float[Array, "m c q"], whitener: Whitener) -> Float[Array, "c q q"]:
    """`[F⁻¹]_QQ = (I − Z_QᵀZ_Q)/λ` for some groups, with `Z = L⁻¹G`.

    A group whose matrix is lost to rounding is taken for uncorrelated. In exact arithmetic no pivot is below `1/F_qq`,
    which is a pivot of weights that no other can replace; one that is more than 1 % below it is rounding.

    Args:
        columns: Columns of `G` for each group, `[m, c, q]`.
        whitener: From `whiten_gram` of all columns.

    Returns:
        `[c, q, q]`, positive definite; NaN where the square of a gradient overflows.

    Cost:
        About `1.25m²cq + 2mcq²` flops; workspace `2mcq`.
    """
    m, c, q = columns.shape
    products = jnp.zeros((c, q, q), jnp.promote_types(columns.dtype, jnp.float32))
    for start, end in row_panels(m):
        z = contract("ij,jcq->icq", whitener.root[start:end, :end], columns[:end])
        products += contract("icq,icr->cqr", z, z)
    least = least_diagonal(columns.reshape(m, c * q), whitener.damping).reshape(c, q)
    return guard_submatrices((jnp.eye(q, dtype=products.dtype) - products) / whitener.damping, least)


def guard_submatrices(inverse: Float[Array, "c q q"], least: Float[Array, "c q"]) -> Float[Array, "c q q"]:
    """Replace `[F⁻¹]_QQ` by `diag(1/F_qq)` in groups where rounding has made it indefinite.

    Args:
        inverse: `[F⁻¹]_QQ` as computed.
        least: `1/F_qq`.

    Returns:
        `[c, q, q]`.

    Cost:
        `2q³/3` flops a group.
    """
    eye = jnp.eye(inverse.shape[-1], dtype=bool)
    diagonal = jnp.diagonal(inverse, axis1=-2, axis2=-1)
    inverse = jnp.where(eye, jnp.maximum(diagonal, least)[..., None], inverse)
    if inverse.shape[-1] <= ELIMINATED:
        pivots, _ = eliminate(inverse, least)
    elif inverse.shape[0] == 1:  # no batch of LAPACK calls where there is one group
        pivots = jnp.diagonal(jnp.linalg.cholesky(inverse[0]))[None] ** 2
    else:
        pivots = jnp.diagonal(jnp.linalg.cholesky(inverse), axis1=-2, axis2=-1) ** 2
    sound = jnp.all(pivots >= 0.99 * least, axis=-1)  # NaN is not
    return jnp.where(sound[..., None, None], inverse, jnp.where(eye, least[..., None], 0))


@jax.jit
def dual_group_cost(columns: Float[Array, "m q"], whitener: Whitener, target: Float[Array, " q"]) -> Float[Array, ""]:
    """Joint cost of one group of more weights than there are gradients: an `m × m` system in place of `q × q`.

    `½ tᵀ([F⁻¹]_QQ)⁻¹t = ½λ(‖t‖² + (Zt)ᵀ(I − ZZᵀ)⁻¹Zt)` with `Z = L⁻¹G_Q`.

    Args:
        columns: `G_Q [m, q]`.
        whitener: From `whiten_gram` of all columns.
        target: `t_Q`.

    Returns:
        In units of the loss; at most `½ tᵀF_QQ t`, which is the cost if no other weight moves and stands where
        the system is lost to rounding.

    Cost:
        About `4m²q + m³/3` flops; workspace `mq + 3m²`.
    """
    m = columns.shape[0]
    z = contract("ij,jq->iq", whitener.root, columns)
    along = contract("iq,q->i", z, target)
    factor = jnp.linalg.cholesky(jnp.eye(m, dtype=z.dtype) - contract("iq,jq->ij", z, z))
    half = lax.linalg.triangular_solve(factor, along[:, None], left_side=True, lower=True)[:, 0]
    length, alone = contract("q,q->", target, target), contract("mq,q->m", columns, target)
    cost = whitener.damping * (length + contract("i,i->", half, half))
    bound = whitener.damping * length + contract("m,m->", alone, alone) / m
    return 0.5 * jnp.where(cost < bound, cost, bound)


@partial(jax.jit, static_argnames="count")
def cheapest_subset(
    inverse: Float[Array, "q q"], target: Float[Array, " q"], gone: Bool[Array, " q"], *, count: int
) -> tuple[Bool[Array, " q"], Float[Array, ""]]:
    """The `count` weights of a group that cost least together, those that are gone already first.

    Args:
        inverse: `[H⁻¹]_QQ`.
        target: `t_Q`.
        gone: Weights that are pruned already: as many of them as possible are in the subset.
        count: Weights of the subset.

    Returns:
        True on the subset, and its joint cost. All subsets are compared where there are at most 70 of them (4:8);
        otherwise the subset grows by the cheapest weight at a time, the others moving after each.

    Cost:
        `2 C(q, count) count³/3` flops, or `2 count · q²` for the greedy form.

    References:
        Kurtić et al., oBERT, 2022 (arXiv 2203.07259), section 3; Frantar & Alistarh, OBC, 2022
        (arXiv 2208.11580), ExactOBS, for the greedy form.
    """
    q = target.shape[0]
    if math.comb(q, count) > MAX_SUBSETS:
        return _greedy_subset(inverse, target, gone, count)
    subsets = np.array(list(combinations(range(q), count)))
    pivots, costs = eliminate(inverse[subsets[:, :, None], subsets[:, None, :]], target[subsets])
    cost = jnp.where(jnp.all(pivots > 0, axis=-1), jnp.sum(costs, axis=-1), jnp.nan)
    used = jnp.sum(gone[subsets], axis=-1)
    allowed = used == jnp.max(used)
    best = jnp.argmin(jnp.where(allowed, cost, jnp.inf))
    member = np.zeros((len(subsets), q), bool)
    np.put_along_axis(member, subsets, True, axis=1)
    return jnp.asarray(member)[best], cost[best]


def _greedy_subset(
    inverse: Float[Array, "q q"], target: Float[Array, " q"], gone: Bool[Array, " q"], count: int
) -> tuple[Bool[Array, " q"], Float[Array, ""]]:
    def remove(_: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        inverse, target, chosen, total = state
        diagonal = jnp.diagonal(inverse)
        cost = jnp.where(diagonal > 0, target**2 / (2 * diagonal), jnp.nan)
        order = jnp.where(chosen, jnp.inf, jnp.where(gone, -jnp.inf, cost))
        best = jnp.argmin(order)
        ratio = inverse[best] / diagonal[best]
        return (
            inverse - ratio[:, None] * inverse[best],
            target - ratio * target[best],
            chosen.at[best].set(True),
            total + cost[best],
        )

    start = inverse, target, jnp.zeros_like(gone), jnp.zeros((), inverse.dtype)
    _, _, chosen, total = lax.fori_loop(0, count, remove, start)
    return chosen, total
