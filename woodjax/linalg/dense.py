"""Dense blocks: the inverse of the damped Fisher by a Cholesky factor of the block itself."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from woodjax.door import checked
from woodjax.linalg.guards import inverse_cholesky
from woodjax.linalg.products import contract


class DampedInverse(NamedTuple):
    """An inverse, and the damping that it took."""

    inverse: Float[Array, "b b"]
    damping: Float[Array, ""]  # as asked, or raised by powers of ten


@checked
@jax.jit
def primal_inverse(gradients: Float[Array, "m b"], damping: Float[Array, ""] | float) -> DampedInverse:
    """Invert the damped Fisher by a Cholesky factor of `F` itself.

    Args:
        gradients: Per-example gradients `G [m, b]`.
        damping: `λ > 0`, in units of squared gradients.

    Returns:
        `F⁻¹ [b, b]`, symmetric, and the damping used: in float32 higher than asked if `λ` is
        below about 1e-6 of the largest eigenvalue.

    Cost:
        `2mb² + 2b³` flops; `2b²` workspace.

    References:
        Singh & Alistarh, WoodFisher, 2020 (arXiv 2004.14340), equation 5: the matrix that is inverted.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> gradients = jnp.diag(jnp.array([2.0, 0.0]))  # F = diag(2, 0)
        >>> wj.primal_inverse(gradients, 2.0).inverse.round(3).tolist()
        [[0.25, 0.0], [0.0, 0.5]]
    """
    return fisher_inverse(contract("mi,mj->ij", gradients, gradients) / gradients.shape[0], damping)


@checked
@jax.jit
def fisher_inverse(fisher: Float[Array, "b b"], damping: Float[Array, ""] | float) -> DampedInverse:
    """Invert a Fisher that has been summed up already.

    Args:
        fisher: `(1/m) Σ g gᵀ`, `[b, b]`, without damping.
        damping: `λ > 0`, in units of squared gradients.

    Returns:
        `(F + λI)⁻¹ [b, b]`, symmetric, and the damping used.

    Cost:
        `2b³` flops; `2b²` workspace.

    References:
        As `primal_inverse`.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> wj.fisher_inverse(jnp.diag(jnp.array([2.0, 0.0])), 2.0).inverse.round(3).tolist()
        [[0.25, 0.0], [0.0, 0.5]]
    """
    root, used = inverse_cholesky(fisher, damping)
    return DampedInverse(contract("ki,kj->ij", root, root), used)


@checked
@jax.jit
def joint_step_inverse(
    inverse: Float[Array, "b b"],
    weights: Float[Array, " b"],
    kept: Bool[Array, " b"],
    gradient: Float[Array, " b"] | None = None,
) -> Float[Array, " b"]:
    """Exact minimiser of the quadratic model when all of `Q` goes at once, from `H⁻¹`.

    `δ = −h − H⁻¹_{:Q}([H⁻¹]_QQ)⁻¹(w_Q − h_Q)` with `h = H⁻¹ḡ`. The system keeps its static
    shape `b × b`: kept rows and columns are replaced by those of a scaled identity.

    Args:
        inverse: `H⁻¹ [b, b]`.
        weights: `w [b]`.
        kept: True on `K`, False on `Q`.
        gradient: `ḡ [b]`, the first-order term; None for a network at a minimum.

    Returns:
        The step `δ [b]`, exactly `−w` on `Q`.

    Cost:
        `b³/3 + 6b²` flops; one masked copy of `H⁻¹`.

    References:
        Hassibi & Stork 1992; Kurtić et al., oBERT, 2022 (arXiv 2203.07259), equation 5.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> inverse = jnp.array([[1.0, 0.5], [0.5, 1.0]])
        >>> wj.joint_step_inverse(inverse, jnp.ones(2), jnp.array([True, False])).round(3).tolist()
        [-0.5, -1.0]
    """
    newton = jnp.zeros_like(weights) if gradient is None else contract("ij,j->i", inverse, gradient)
    pruned = ~kept
    scale = jnp.mean(jnp.diagonal(inverse))
    both = pruned[:, None] & pruned[None, :]
    system = jnp.where(both, inverse, 0) + jnp.diag(jnp.where(kept, scale, 0))
    multiplier = solve_cholesky(system, jnp.where(pruned, weights - newton, 0))
    step = -newton - contract("ij,j->i", inverse, multiplier)
    return jnp.where(kept, step, -weights)


@jax.jit
def solve_cholesky(matrix: Float[Array, "n n"], vector: Float[Array, " n"]) -> Float[Array, " n"]:
    """Solve a symmetric positive definite system.

    Args:
        matrix: `[n, n]`.
        vector: `[n]`.

    Returns:
        `matrix⁻¹ vector`, NaN where the matrix is not positive definite.

    Cost:
        `n³/3 + 2n²` flops.
    """
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(matrix), True), vector)
