"""Matrix products in full precision, and the Gram matrix of more columns than fit at once.

Every contraction of the library goes through `contract`: JAX's default float32 product is bfloat16
on TPU and TF32 on recent GPUs, and `1 − ΣZ²` does not survive that.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Num

from woodjax.door import checked

COLUMN_WINDOW = 4096  # columns of G in work at once: bounds the workspace, and fits the caches
ROW_PANEL = 256  # rows of a symmetric or triangular product in one matrix product


@checked
def contract(subscripts: str, *operands: Array) -> Array:
    """Einstein sum in full precision: float32 products are float32 on every device.

    Args:
        subscripts: As for `jax.numpy.einsum`.
        *operands: Arrays; those of fewer than 32 bits are accumulated in float32.

    Returns:
        The contraction, at least float32.

    Cost:
        That of the products named by `subscripts`.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> half = jnp.array([1.0, 2.0], jnp.bfloat16)
        >>> wj.contract("i,i->", half, half)
        Array(5., dtype=float32)
    """
    dtype = jnp.promote_types(jnp.result_type(*operands), jnp.float32)
    return jnp.einsum(subscripts, *operands, precision=lax.Precision.HIGHEST, preferred_element_type=dtype)


@checked
@partial(jax.jit, static_argnames="axes")
def gram(
    gradients: Float[Array, "m b"], kept: Bool[Array, " b"] | None = None, *, axes: tuple[str, ...] = ()
) -> Float[Array, "m m"]:
    """Gram matrix `GGᵀ`, a window of columns at a time.

    Args:
        gradients: Per-example gradients `G [m, b]`.
        kept: Columns that count; None for all.
        axes: Inside `shard_map`: mesh axes over which the columns are split, each device with some of them.

    Returns:
        `GGᵀ [m, m]`, symmetric.

    Cost:
        About `1.25m²b` flops, the panels of the lower triangle; workspace `m · min(b, 4096)` and `2m²`.

    References:
        Frantar et al., M-FAC, 2021 (arXiv 2107.03356): what the inverse needs of `G`.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> wj.gram(jnp.array([[1.0, 2.0], [0.0, 1.0]])).tolist()
        [[5.0, 2.0], [2.0, 1.0]]
    """
    m, b = gradients.shape
    width = min(b, COLUMN_WINDOW)
    dtype = jnp.promote_types(gradients.dtype, jnp.float32)

    def add(total: Array, first: Array) -> tuple[Array, None]:
        columns, fresh = window(gradients, first, width)
        if kept is not None:
            fresh &= lax.dynamic_slice_in_dim(kept, jnp.minimum(first, b - width), width)
        return total + lower_gram(jnp.where(fresh, columns, 0)), None

    lower = lax.scan(add, jnp.zeros((m, m), dtype), jnp.arange(0, b, width))[0]
    return mirror(total_over(lower, axes))


def total_over(partial_sum: Num[Array, "..."], axes: tuple[str, ...]) -> Num[Array, "..."]:
    """Sum over the devices along mesh axes, inside `shard_map`; nothing is done without axes.

    Args:
        partial_sum: Of the columns that are here.
        axes: Mesh axes.

    Returns:
        The sum of all columns.

    Cost:
        One all-reduce.
    """
    return lax.psum(partial_sum, axes) if axes else partial_sum


def window(gradients: Float[Array, "m b"], first: Array, width: int) -> tuple[Float[Array, "m w"], Bool[Array, " w"]]:
    """Columns `first` to `first + width`; the last window starts earlier, to end with the matrix.

    Args:
        gradients: `G [m, b]`.
        first: First column wanted.
        width: Columns in a window, at most `b`.

    Returns:
        The columns, and which of them are at or after `first`.

    Cost:
        A copy of `m · width` elements.
    """
    start = jnp.minimum(first, gradients.shape[1] - width)
    fresh = jnp.arange(width) >= first - start
    return lax.dynamic_slice_in_dim(gradients, start, width, axis=1), fresh


def leverage(root: Float[Array, "m m"], columns: Float[Array, "m w"]) -> Float[Array, " w"]:
    """Sums of squares of the columns of `L⁻¹G`, without holding `L⁻¹G`.

    Args:
        root: `L⁻¹ [m, m]`, lower triangular.
        columns: A window of `G`.

    Returns:
        `Σᵢ (L⁻¹G)_iq²` for every column `q`.

    Cost:
        About `1.25m²w` flops: the zeros of the triangle are skipped by panels.
    """
    total = jnp.zeros(columns.shape[1], jnp.promote_types(columns.dtype, jnp.float32))
    for start, end in row_panels(root.shape[0]):
        z = contract("ij,jb->ib", root[start:end, :end], columns[:end])
        total += contract("ib,ib->b", z, z)
    return total


def lower_gram(rows: Float[Array, "m w"]) -> Float[Array, "m m"]:
    """Lower triangle of `XXᵀ`; zero above the diagonal.

    Args:
        rows: `X [m, w]`.

    Returns:
        `[m, m]`.

    Cost:
        About `1.25m²w` flops.
    """
    m = rows.shape[0]
    lower = jnp.zeros((m, m), jnp.promote_types(rows.dtype, jnp.float32))
    for start, end in row_panels(m):
        lower = lax.dynamic_update_slice(lower, contract("ib,jb->ij", rows[start:end], rows[:end]), (start, 0))
    return jnp.tril(lower)


def mirror(lower: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """The symmetric matrix with this lower triangle.

    Args:
        lower: Zero above the diagonal.

    Returns:
        `[m, m]`.

    Cost:
        One pass over `m²` elements.
    """
    return lower + jnp.tril(lower, -1).T


def row_panels(m: int) -> list[tuple[int, int]]:
    """Ranges of rows, few enough to be unrolled: at most four, each of at least `ROW_PANEL` rows."""
    height = max(ROW_PANEL, -(-m // 4))
    return [(start, min(start + height, m)) for start in range(0, m, height)]
