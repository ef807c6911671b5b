"""What keeps rounding from passing silently: factors that are tested, diagonals that are bounded."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

MAX_RAISES = 40  # times that a damping may be multiplied by ten: from the smallest float32 to any matrix


def inverse_cholesky(
    matrix: Float[Array, "n n"], ridge: Float[Array, ""] | float
) -> tuple[Float[Array, "n n"], Float[Array, ""]]:
    """`L⁻¹` of `matrix + ridge·I = LLᵀ`, with as much ridge as the precision at hand asks for.

    An explicit triangular inverse turns every later solve into a matrix product rather than a
    triangular solve with as many right-hand sides as there are parameters.

    Args:
        matrix: Positive semidefinite, `[n, n]`; the lower triangle is read.
        ridge: Positive.

    Returns:
        `L⁻¹ [n, n]`, and the ridge that it took: as asked, or raised by powers of ten; NaN where
        no ridge helps. Factored in float64 if JAX has it switched on and the backend has it.

    Cost:
        `2n³/3` flops; `2n²` workspace.
    """
    n, dtype = matrix.shape[0], matrix.dtype
    if jax.default_backend() != "tpu":  # float64 is emulated there
        matrix = matrix.astype(jax.dtypes.canonicalize_dtype(jnp.float64))
    eye = jnp.eye(n, dtype=matrix.dtype)
    finite = jnp.all(jnp.isfinite(jnp.diagonal(matrix)))  # else no ridge helps

    def cholesky(ridge: Array) -> Array:
        return lax.linalg.cholesky(matrix + ridge * eye, symmetrize_input=False)

    def is_sound(factor: Array, used: Array) -> Array:
        # Every pivot is at least the smallest eigenvalue, so at least the ridge: one that is not is rounding.
        pivots = jnp.diagonal(factor) ** 2
        return jnp.all((pivots >= 0.99 * used) & jnp.isfinite(pivots)) & (used > 0)

    def is_spoiled(state: tuple[Array, Array, Array]) -> Array:
        factor, used, raises = state
        return ~is_sound(factor, used) & (raises < MAX_RAISES) & finite

    def raise_ridge(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        _, used, raises = state
        return cholesky(10 * used), 10 * used, raises + 1

    first = jnp.asarray(ridge, matrix.dtype)
    factor, used, _ = lax.while_loop(is_spoiled, raise_ridge, (cholesky(first), first, jnp.zeros((), jnp.int32)))
    factor = jnp.where(is_sound(factor, used), factor, jnp.nan)  # past mending: NaN or overflow in the matrix
    return solve_triangular(factor, eye, lower=True).astype(dtype), used.astype(dtype)


def least_diagonal(gradients: Float[Array, "m b"], damping: Float[Array, ""] | float) -> Float[Array, " b"]:
    """`1/F_qq`, which `[F⁻¹]_qq` cannot be below (Cauchy–Schwarz).

    Args:
        gradients: Per-example gradients.
        damping: `λ`.

    Returns:
        `[b]`; NaN where the square of a gradient overflows.

    Cost:
        `2mb` flops.
    """
    fisher = (
        jnp.sum(jnp.square(gradients.astype(jnp.promote_types(gradients.dtype, jnp.float32))), axis=0)
        / gradients.shape[0]
        + damping
    )
    return jnp.where(jnp.isfinite(fisher), 1 / fisher, jnp.nan)


def with_diagonal(matrix: Float[Array, "b b"], diagonal: Float[Array, " b"]) -> Float[Array, "b b"]:
    """Put a diagonal into a matrix, in the same pass over memory that makes the matrix.

    Args:
        matrix: `[b, b]`.
        diagonal: `[b]`.

    Returns:
        `[b, b]`.

    Cost:
        One pass over `b²` elements.
    """
    b = matrix.shape[0]
    row, column = (lax.broadcasted_iota(jnp.int32, (b, b), axis) for axis in (0, 1))
    return jnp.where(row == column, diagonal[:, None], matrix)
