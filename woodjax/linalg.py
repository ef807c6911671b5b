"""The empirical Fisher of one block and its inverse, on arrays alone.

Symbols: `G [m, b]` gradients, `λ` damping, `F = λI + GᵀG/m` the damped Fisher.

| function | gives | flops | best for |
|---|---|---|---|
| `woodbury_scan` | `F⁻¹`, one example at a time | `4mb²`, and as many bytes | the paper's form, streaming |
| `woodbury_scan_rank_k` | `F⁻¹`, k examples at a time | `4mb² + 2mk(b + k)` | streaming |
| `primal_inverse` | `F⁻¹` by Cholesky of `F` | `2mb² + 2b³` | `m ≥ b` |
| `dual_inverse` | `F⁻¹` by Cholesky of the Gram matrix | `2m²b + m³ + 2mb²` | `m < b` |
| `whiten_gram` | the factor that answers the rest without `F⁻¹` | `2m²b + m³` | `m ≪ b`, the whole network |

A diagonal that is a small difference of large numbers may come out as nothing, or below: it is bounded
by `[F⁻¹]_qq ≥ 1/F_qq`, which holds for every positive definite matrix. A Cholesky factor that rounding
has spoiled is made again with ten times the damping, block by block; the damping that was used is
returned beside the factor.

Everything here is for one block, jitted, and meant to be `vmap`ped. Every contraction goes
through `contract`: JAX's default float32 product is bfloat16 on TPU and TF32 on recent GPUs,
and `1 − ΣZ²` does not survive that.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float

MAX_RAISES = 12  # times that a damping may be multiplied by ten
COLUMN_CHUNK = 8192  # columns of G whitened at once: bounds the workspace of `dual_inverse_diagonal`


def contract(subscripts: str, *operands: Array) -> Array:
    """Einstein sum in full precision: float32 products are float32 on every device.

    Args:
        subscripts: As for `jax.numpy.einsum`.
        *operands: Arrays; those of fewer than 32 bits are accumulated in float32.

    Returns:
        The contraction, at least float32.

    Cost:
        That of the products named by `subscripts`.
    """
    dtype = jnp.promote_types(jnp.result_type(*operands), jnp.float32)
    return jnp.einsum(subscripts, *operands, precision=lax.Precision.HIGHEST, preferred_element_type=dtype)


@jax.jit
def woodbury_scan(gradients: Float[Array, "m b"], damping: Float[Array, ""] | float) -> Float[Array, "b b"]:
    """Invert the damped Fisher by one rank-1 Woodbury update per example.

    `F₀⁻¹ = I/λ`, then for every `g` with `u = F⁻¹g`: `F⁻¹ ← F⁻¹ − uuᵀ/(m + gᵀu)`.

    Args:
        gradients: Per-example gradients `G [m, b]`.
        damping: `λ > 0`, in units of squared gradients.

    Returns:
        `F⁻¹ [b, b]`.

    Cost:
        `4mb²` flops and about `12mb²` bytes: bound by memory on every device.

    References:
        Singh & Alistarh, WoodFisher, 2020 (arXiv 2004.14340), equation 6.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> wj.woodbury_scan(jnp.array([[2.0]]), 1.0).round(3).tolist()  # 1 / (1 + 2·2)
        [[0.20000000298023224]]
    """
    m, b = gradients.shape

    def step(inverse: Array, g: Array) -> tuple[Array, None]:
        u = contract("ij,j->i", inverse, g)
        return inverse - jnp.outer(u, u) / (m + contract("i,i->", g, u)), None

    dtype = jnp.promote_types(gradients.dtype, jnp.float32)
    return _bound_diagonal(lax.scan(step, jnp.eye(b, dtype=dtype) / damping, gradients)[0], gradients, damping)


@partial(jax.jit, static_argnames="rank")
def woodbury_scan_rank_k(
    gradients: Float[Array, "m b"], damping: Float[Array, ""] | float, *, rank: int = 32
) -> Float[Array, "b b"]:
    """Invert the damped Fisher by one rank-k Woodbury update per `rank` examples.

    With `U = F⁻¹G_kᵀ` and `LLᵀ = mI + G_kU`: `F⁻¹ ← F⁻¹ − (L⁻¹Uᵀ)ᵀ(L⁻¹Uᵀ)`.

    Args:
        gradients: Per-example gradients `G [m, b]`.
        damping: `λ > 0`, in units of squared gradients.
        rank: Examples in one update; the last group is filled with zeros, which change nothing.

    Returns:
        `F⁻¹ [b, b]`.

    Raises:
        ValueError: `rank < 1`.

    Cost:
        `4mb² + 2mk(b + k)` flops as matrix products; `12mb²/k` bytes.

    References:
        Woodbury 1950; the recursion of WoodFisher (arXiv 2004.14340) in groups.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}: pass at least 1.")
    m, b = gradients.shape
    dtype = jnp.promote_types(gradients.dtype, jnp.float32)
    chunks = jnp.pad(gradients, ((0, -m % rank), (0, 0))).reshape(-1, rank, b)

    def step(inverse: Array, chunk: Array) -> tuple[Array, None]:
        u = contract("ij,kj->ik", inverse, chunk)
        gram = contract("ki,il->kl", chunk, u) + m * jnp.eye(rank, dtype=dtype)
        v = solve_triangular(jnp.linalg.cholesky(gram), u.T, lower=True)
        return inverse - contract("ki,kj->ij", v, v), None

    return _bound_diagonal(lax.scan(step, jnp.eye(b, dtype=dtype) / damping, chunks)[0], gradients, damping)


class DampedInverse(NamedTuple):
    """An inverse, and the damping that it took."""

    inverse: Float[Array, "b b"]
    damping: Float[Array, ""]  # as asked, or raised by powers of ten


class Whitener(NamedTuple):
    """The inverse Cholesky factor `L⁻¹` of `mλI + GGᵀ`, and the damping `λ` that it took."""

    root: Float[Array, "m m"]
    damping: Float[Array, ""]  # as asked, or raised by powers of ten


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
    """
    m = gradients.shape[0]
    root, used = _inverse_cholesky(contract("mi,mj->ij", gradients, gradients) / m, damping)
    return DampedInverse(contract("ki,kj->ij", root, root), used)


@jax.jit
def whiten_gram(gradients: Float[Array, "m b"], damping: Float[Array, ""] | float) -> Whitener:
    """Inverse Cholesky factor `L⁻¹` of the dual matrix `mλI + GGᵀ = LLᵀ`.

    All that the dual form is asked is a matrix product with it: `F⁻¹ = (I − ZᵀZ)/λ`, `Z = L⁻¹G`.

    Args:
        gradients: Per-example gradients `G [m, b]`.
        damping: `λ > 0`, in units of squared gradients.

    Returns:
        `L⁻¹ [m, m]`, lower triangular, and the damping used.

    Cost:
        `2m²b + m³` flops; `2m²` workspace.

    References:
        Frantar et al., M-FAC, 2021 (arXiv 2107.03356): the same products from stored gradients.
    """
    m = gradients.shape[0]
    root, used = _inverse_cholesky(contract("ib,jb->ij", gradients, gradients), m * damping)
    return Whitener(root, used / m)


@jax.jit
def dual_inverse(gradients: Float[Array, "m b"], damping: Float[Array, ""] | float) -> DampedInverse:
    """Invert the damped Fisher through the `m × m` Gram matrix.

    `F⁻¹ = (I − Gᵀ(mλI + GGᵀ)⁻¹G)/λ`.

    Args:
        gradients: Per-example gradients `G [m, b]`.
        damping: `λ > 0`, in units of squared gradients.

    Returns:
        `F⁻¹ [b, b]`, symmetric, and the damping used.

    Cost:
        `2m²b + m³ + 2mb²` flops.
    """
    root, used = whiten_gram(gradients, damping)
    z = contract("ij,jb->ib", root, gradients)
    inverse = (jnp.eye(z.shape[1], dtype=z.dtype) - contract("mi,mj->ij", z, z)) / used
    return DampedInverse(_bound_diagonal(inverse, gradients, used), used)


@jax.jit
def dual_inverse_diagonal(gradients: Float[Array, "m b"], whitener: Whitener) -> Float[Array, " b"]:
    """Diagonal of `F⁻¹` without `F⁻¹`: `(1 − Σᵢ Z_iq²)/λ`, a chunk of columns at a time.

    Args:
        gradients: Per-example gradients `G [m, b]`.
        whitener: From `whiten_gram`.

    Returns:
        `[F⁻¹]_qq` for every `q`, `[b]`, at least the `1/F_qq` that exact arithmetic promises.

    Cost:
        `2m²b` flops; workspace `m · min(b, 8192)`: `Z [m, b]` is never held.
    """
    m, b = gradients.shape
    chunk = min(b, COLUMN_CHUNK)
    starts = jnp.minimum(jnp.arange(0, b, chunk), b - chunk)  # the last chunk may overlap its neighbour

    def leverage(start: Array) -> Array:
        columns = lax.dynamic_slice(gradients, (0, start), (m, chunk))
        z = contract("ij,jb->ib", whitener.root, columns)
        return contract("ib,ib->b", z, z)

    sums = lax.map(leverage, starts)
    whole = jnp.zeros(b, sums.dtype).at[starts[:, None] + jnp.arange(chunk)].set(sums)
    return jnp.maximum((1 - whole) / whitener.damping, _least_diagonal(gradients, whitener.damping))


@jax.jit
def dual_solve(
    gradients: Float[Array, "m b"],
    whitener: Whitener,
    vector: Float[Array, " b"],
) -> Float[Array, " b"]:
    """Inverse-Fisher-vector product `F⁻¹v = (v − Gᵀ(mλI + GGᵀ)⁻¹Gv)/λ`.

    Args:
        gradients: Per-example gradients `G [m, b]`.
        whitener: From `whiten_gram`.
        vector: `v [b]`.

    Returns:
        `F⁻¹v [b]`.

    Cost:
        `4mb + 4m²` flops.
    """
    coefficients = contract("ij,j->i", whitener.root, contract("mb,b->m", gradients, vector))
    back = contract("mb,m->b", gradients, contract("ij,i->j", whitener.root, coefficients))
    return (vector - back) / whitener.damping


@jax.jit
def joint_step_gram(
    gradients: Float[Array, "m b"],
    damping: Float[Array, ""] | float,
    weights: Float[Array, " b"],
    kept: Bool[Array, " b"],
    gradient: Float[Array, " b"] | None = None,
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

    Returns:
        The step `δ [b]`, exactly `−w` on `Q`. If the factor of the survivors needs more damping than
        `λ` the step is that of the raised one: shorter, and what it loses is seen in its predicted change.

    Cost:
        `2m²b + m³` flops; one masked copy of `G`.

    References:
        Hassibi & Stork 1992 (one weight); Benbaki et al., CHITA, 2023 (arXiv 2302.14623), section 3.
    """
    survivors = jnp.where(kept, gradients, 0)
    whitener = whiten_gram(survivors, damping)
    residual = contract("mb,b->m", gradients, jnp.where(kept, 0, weights))
    dual = contract("ij,i->j", whitener.root, contract("ij,j->i", whitener.root, residual))
    step = contract("mb,m->b", survivors, dual)
    if gradient is not None:
        step -= dual_solve(survivors, whitener, jnp.where(kept, gradient, 0))
    return jnp.where(kept, step, -weights)


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


def _least_diagonal(gradients: Float[Array, "m b"], damping: Float[Array, ""] | float) -> Float[Array, " b"]:
    """`1/F_qq ≤ [F⁻¹]_qq` (Cauchy–Schwarz); NaN where the square of a gradient overflows."""
    fisher = contract("mb,mb->b", gradients, gradients) / gradients.shape[0] + damping
    return jnp.where(jnp.isfinite(fisher), 1 / fisher, jnp.nan)


def _bound_diagonal(
    inverse: Float[Array, "b b"], gradients: Float[Array, "m b"], damping: Float[Array, ""] | float
) -> Float[Array, "b b"]:
    diagonal = jnp.diagonal(inverse)
    return inverse + jnp.diag(jnp.maximum(diagonal, _least_diagonal(gradients, damping)) - diagonal)


def _inverse_cholesky(
    matrix: Float[Array, "n n"], ridge: Float[Array, ""] | float
) -> tuple[Float[Array, "n n"], Float[Array, ""]]:
    """`L⁻¹` of `matrix + ridge·I = LLᵀ`, and the ridge it took; `matrix` is positive semidefinite."""
    n, dtype = matrix.shape[0], matrix.dtype
    eye = jnp.eye(n, dtype=dtype)

    def is_sound(factor: Array, used: Array) -> Array:
        # Every pivot is at least the smallest eigenvalue, so at least the ridge: one that is not is rounding.
        pivots = jnp.diagonal(factor) ** 2
        return jnp.all((pivots >= 0.99 * used) & jnp.isfinite(pivots))

    def is_spoiled(state: tuple[Array, Array, Array]) -> Array:
        factor, used, raises = state
        return ~is_sound(factor, used) & (raises < MAX_RAISES)

    def raise_ridge(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        _, used, raises = state
        return jnp.linalg.cholesky(matrix + 10 * used * eye), 10 * used, raises + 1

    first = jnp.asarray(ridge, dtype)
    start = (jnp.linalg.cholesky(matrix + first * eye), first, jnp.zeros((), jnp.int32))
    factor, used, _ = lax.while_loop(is_spoiled, raise_ridge, start)
    factor = jnp.where(is_sound(factor, used), factor, jnp.nan)  # past mending: NaN or overflow in the matrix
    # An explicit triangular inverse turns every later solve into a matrix product rather than a triangular
    # solve with as many right-hand sides as there are parameters.
    return solve_triangular(factor, eye, lower=True), used
