"""The paper's recursion: the inverse of the damped Fisher by Woodbury updates, example by example."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from woodjax.door import checked
from woodjax.linalg.guards import least_diagonal, with_diagonal
from woodjax.linalg.products import contract


@checked
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
    return _bounded(lax.scan(step, jnp.eye(b, dtype=dtype) / damping, gradients)[0], gradients, damping)


@checked
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

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> gradients = jnp.diag(jnp.array([2.0, 0.0]))  # F = diag(2, 0)
        >>> wj.woodbury_scan_rank_k(gradients, 2.0, rank=2).round(3).tolist()
        [[0.25, 0.0], [0.0, 0.5]]
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

    return _bounded(lax.scan(step, jnp.eye(b, dtype=dtype) / damping, chunks)[0], gradients, damping)


def _bounded(
    inverse: Float[Array, "b b"], gradients: Float[Array, "m b"], damping: Float[Array, ""] | float
) -> Float[Array, "b b"]:
    return with_diagonal(inverse, jnp.maximum(jnp.diagonal(inverse), least_diagonal(gradients, damping)))
