"""The dual form: everything about the damped Fisher from the `m × m` Gram matrix of its gradients.

`F⁻¹ = (I − Gᵀ(mλI + GGᵀ)⁻¹G)/λ`. With `mλI + GGᵀ = LLᵀ` all that is asked is a product with `L⁻¹`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from woodjax.door import checked
from woodjax.linalg.dense import DampedInverse
from woodjax.linalg.guards import inverse_cholesky, least_diagonal, with_diagonal
from woodjax.linalg.products import COLUMN_WINDOW, contract, gram, leverage, total_over, window


class Whitener(NamedTuple):
    """The inverse Cholesky factor `L⁻¹` of `mλI + GGᵀ`, and the damping `λ` that it took."""

    root: Float[Array, "m m"]
    damping: Float[Array, ""]  # as asked, or raised by powers of ten


@checked
@jax.jit
def whiten(matrix: Float[Array, "m m"], damping: Float[Array, ""] | float) -> Whitener:
    """Inverse Cholesky factor `L⁻¹` of `mλI + GGᵀ = LLᵀ`, from a Gram matrix.

    Args:
        matrix: `GGᵀ [m, m]`.
        damping: `λ > 0`, in units of squared gradients.

    Returns:
        `L⁻¹ [m, m]`, lower triangular, and the damping used.

    Cost:
        `2m³/3` flops; `2m²` workspace.

    References:
        As `whiten_gram`.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> wj.whiten(jnp.array([[3.0]]), 1.0).root.round(3).tolist()  # 1 / √(1 + 3)
        [[0.5]]
    """
    m = matrix.shape[0]
    root, used = inverse_cholesky(matrix, m * damping)
    return Whitener(root, used / m)


@checked
@jax.jit
def whiten_gram(
    gradients: Float[Array, "m b"], damping: Float[Array, ""] | float, kept: Bool[Array, " b"] | None = None
) -> Whitener:
    """Inverse Cholesky factor `L⁻¹` of the dual matrix `mλI + GGᵀ = LLᵀ`.

    Args:
        gradients: Per-example gradients `G [m, b]`.
        damping: `λ > 0`, in units of squared gradients.
        kept: Columns that count; None for all.

    Returns:
        `L⁻¹ [m, m]`, lower triangular, and the damping used.

    Cost:
        About `m²b + 2m³/3` flops; workspace `2m² + m · min(b, 4096)`.

    References:
        Frantar et al., M-FAC, 2021 (arXiv 2107.03356): the same products from stored gradients.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> wj.whiten_gram(jnp.ones((1, 3)), 1.0).root.round(3).tolist()  # 1 / √(1 + 3)
        [[0.5]]
    """
    return whiten(gram(gradients, kept), damping)


@checked
@jax.jit
def dual_inverse(gradients: Float[Array, "m b"], damping: Float[Array, ""] | float) -> DampedInverse:
    """Invert the damped Fisher through the `m × m` Gram matrix.

    Args:
        gradients: Per-example gradients `G [m, b]`.
        damping: `λ > 0`, in units of squared gradients.

    Returns:
        `F⁻¹ [b, b]`, symmetric, and the damping used.

    Cost:
        About `3m²b + 2m³/3 + 2mb²` flops.

    References:
        The identity of Woodbury 1950; Frantar et al., M-FAC, 2021 (arXiv 2107.03356), from stored gradients.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> gradients = jnp.diag(jnp.array([2.0, 0.0]))  # F = diag(2, 0)
        >>> jnp.diagonal(wj.dual_inverse(gradients, 2.0).inverse).round(3).tolist()
        [0.25, 0.5]
    """
    root, used = whiten_gram(gradients, damping)
    z = contract("ij,jb->ib", root, gradients)
    diagonal = jnp.maximum((1 - contract("mi,mi->i", z, z)) / used, least_diagonal(gradients, used))
    return DampedInverse(with_diagonal(contract("mi,mj->ij", z, z) / -used, diagonal), used)


@checked
@jax.jit
def dual_inverse_diagonal(gradients: Float[Array, "m b"], whitener: Whitener) -> Float[Array, " b"]:
    """Diagonal of `F⁻¹` without `F⁻¹`: `(1 − Σᵢ Z_iq²)/λ` with `Z = L⁻¹G`, a window of columns at a time.

    Args:
        gradients: Per-example gradients `G [m, b]`.
        whitener: From `whiten_gram`.

    Returns:
        `[F⁻¹]_qq` for every `q`, `[b]`, at least the `1/F_qq` that exact arithmetic promises.

    Cost:
        About `1.25m²b` flops; workspace `2m · min(b, 4096)`: `Z [m, b]` is never held.

    References:
        The identity of Woodbury 1950; Frantar et al., M-FAC, 2021 (arXiv 2107.03356), from stored gradients.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> gradients = jnp.diag(jnp.array([2.0, 0.0]))  # F = diag(2, 0)
        >>> wj.dual_inverse_diagonal(gradients, wj.whiten_gram(gradients, 2.0)).round(3).tolist()
        [0.25, 0.5]
    """
    b = gradients.shape[1]
    width = min(b, COLUMN_WINDOW)
    firsts = jnp.arange(0, b, width)
    parts = lax.map(lambda first: window_inverse_diagonal(window(gradients, first, width)[0], whitener), firsts)
    starts = jnp.minimum(firsts, b - width)  # the last window overlaps the one before, with the same values
    return jnp.zeros(b, parts.dtype).at[starts[:, None] + jnp.arange(width)].set(parts)


@jax.jit
def window_inverse_diagonal(columns: Float[Array, "m w"], whitener: Whitener) -> Float[Array, " w"]:
    """The entries of the diagonal of `F⁻¹` that belong to some columns of `G`.

    Args:
        columns: Columns of `G`, `[m, w]`.
        whitener: From `whiten_gram` of all columns.

    Returns:
        `[F⁻¹]_qq`, `[w]`.

    Cost:
        About `1.25m²w` flops.
    """
    cancelled = (1 - leverage(whitener.root, columns)) / whitener.damping
    return jnp.maximum(cancelled, least_diagonal(columns, whitener.damping))


@checked
@partial(jax.jit, static_argnames="axes")
def dual_solve(
    gradients: Float[Array, "m b"],
    whitener: Whitener,
    vector: Float[Array, " b"],
    *,
    axes: tuple[str, ...] = (),
) -> Float[Array, " b"]:
    """Inverse-Fisher-vector product `F⁻¹v = (v − Gᵀ(mλI + GGᵀ)⁻¹Gv)/λ`.

    Args:
        gradients: Per-example gradients `G [m, b]`.
        whitener: From `whiten_gram`.
        vector: `v [b]`.
        axes: As in `gram`.

    Returns:
        `F⁻¹v [b]`.

    Cost:
        `4mb + 4m²` flops.

    References:
        The identity of Woodbury 1950; Frantar et al., M-FAC, 2021 (arXiv 2107.03356), from stored gradients.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> gradients = jnp.diag(jnp.array([2.0, 0.0]))  # F = diag(2, 0)
        >>> wj.dual_solve(gradients, wj.whiten_gram(gradients, 2.0), jnp.array([4.0, 4.0])).round(3).tolist()
        [1.0, 2.0]
    """
    dual = solve_whitened(whitener, total_over(contract("mb,b->m", gradients, vector), axes))
    return (vector - contract("mb,m->b", gradients, dual)) / whitener.damping


@jax.jit
def solve_whitened(whitener: Whitener, vector: Float[Array, " m"]) -> Float[Array, " m"]:
    """`(mλI + GGᵀ)⁻¹v`.

    Args:
        whitener: `L⁻¹`.
        vector: `v [m]`.

    Returns:
        `[m]`.

    Cost:
        `4m²` flops.
    """
    return contract("ij,i->j", whitener.root, contract("ij,j->i", whitener.root, vector))


@checked
@partial(jax.jit, static_argnames="axes")
def joint_step_gram(
    gradients: Float[Array, "m b"],
    damping: Float[Array, ""] | float,
    weights: Float[Array, " b"],
    kept: Bool[Array, " b"],
    gradient: Float[Array, " b"] | None = None,
    *,
    axes: tuple[str, ...] = (),
) -> Float[Array, " b"]:
    """Exact minimiser of the quadratic model when all of `Q` goes at once, from the gradients.

    With `A` the gradients whose pruned columns are zero and `r = G_Q w_Q`:
    `δ_K = Aᵀ(mλI + AAᵀ)⁻¹r − [H_KK]⁻¹ḡ_K`, `δ_Q = −w_Q`. The survivors' side of
    `−H⁻¹_{:Q}([H⁻¹]_QQ)⁻¹w_Q`: one `m × m` system, however many weights go.

    Args:
        gradients: Per-example gradients `G [m, b]`.
        damping: `λ > 0`.
        weights: `w [b]`.
        kept: True on `K`, False on `Q`.
        gradient: `ḡ [b]`, the first-order term; None for a network at a minimum.
        axes: As in `gram`.

    Returns:
        The step `δ [b]`, exactly `−w` on `Q`. If the factor of the survivors needs more damping than
        `λ` the step is that of the raised one: shorter, and what it loses is seen in its predicted change.

    Cost:
        About `m²b + 2m³/3` flops; workspace `2m² + m · min(b, 4096)`: no masked copy of `G` is made.

    References:
        Hassibi & Stork 1992 (one weight); Benbaki et al., CHITA, 2023 (arXiv 2302.14623), section 3.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> wj.joint_step_gram(jnp.array([[1.0, 1.0]]), 1.0, jnp.ones(2), jnp.array([True, False])).round(3).tolist()
        [0.5, -1.0]
    """
    return joint_steps_gram(gradients, jnp.asarray(damping)[None], weights, kept, gradient, axes=axes)[0]


@checked
@partial(jax.jit, static_argnames="axes")
def joint_steps_gram(
    gradients: Float[Array, "m b"],
    dampings: Float[Array, " k"],
    weights: Float[Array, " b"],
    kept: Bool[Array, " b"],
    gradient: Float[Array, " b"] | None = None,
    *,
    axes: tuple[str, ...] = (),
) -> Float[Array, "k b"]:
    """`joint_step_gram` at several dampings, from one Gram matrix.

    Args:
        gradients: Per-example gradients `G [m, b]`.
        dampings: `λ > 0`, any number of them.
        weights: `w [b]`.
        kept: True on `K`, False on `Q`.
        gradient: `ḡ [b]`; None for a network at a minimum.
        axes: As in `gram`.

    Returns:
        One step `δ` for each damping.

    Cost:
        About `m²b + k(2m³/3 + 4mb)` flops, one factor at a time.

    References:
        As `joint_step_gram`.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> gradients, dampings = jnp.array([[1.0, 1.0]]), jnp.array([1.0, 3.0])
        >>> wj.joint_steps_gram(gradients, dampings, jnp.ones(2), jnp.array([True, False])).round(3).tolist()
        [[0.5, -1.0], [0.25, -1.0]]
    """
    survivors_gram = gram(gradients, kept, axes=axes)
    removed = total_over(contract("mb,b->m", gradients, jnp.where(kept, 0, weights)), axes)
    survivors = None if gradient is None else jnp.where(kept, gradient, 0)
    slopes = None if survivors is None else total_over(contract("mb,b->m", gradients, survivors), axes)

    def step(damping: Float[Array, ""]) -> Float[Array, " b"]:
        whitener = whiten(survivors_gram, damping)
        residual = removed if slopes is None else removed + slopes / whitener.damping
        newton = 0.0 if survivors is None else survivors / whitener.damping
        moved = contract("mb,m->b", gradients, solve_whitened(whitener, residual)) - newton
        return jnp.where(kept, moved, -weights)

    return lax.map(step, dampings)
