"""One sweep over the inputs of a dense layer: mask and surviving weights at the price of one inverse.

Every output unit has the same Hessian `H [in, in]`, but exact compensation needs an inverse for each unit's own mask.
Fixing the order in which weights are decided makes all of them share one sequence of inverses: input `i` is decided
with those after it still free, and its error is pushed to these alone. All of these inverses stand in the rows of
one triangular factor, `H⁻¹ = UᵀU`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from woodjax.curvature.damping import ONE_PERCENT, Damping, resolve_damping, split_damping
from woodjax.door import checked_but
from woodjax.linalg import contract
from woodjax.linalg.guards import inverse_cholesky
from woodjax.ranking import lowest
from woodjax.sparsities import Fraction, check_sparsity, prune_count


class SweptKernel(NamedTuple):
    """What a column sweep leaves of a kernel."""

    kernel: Float[Array, "in out"]  # exactly zero where pruned
    mask: Bool[Array, "in out"]  # True = survives
    damping: Float[Array, ""]  # as used


@checked_but("hessian")
def column_sweep(
    kernel: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    *,
    sparsity: Fraction | None = None,
    pattern: tuple[int, int] | None = None,
    block_size: int = 128,
    damping: Damping = ONE_PERCENT,
) -> SweptKernel:
    """Prune the kernel of a dense layer by SparseGPT's sweep over its inputs.

    The mask is chosen a block of inputs at a time, at the weights as compensated so far, by `w²/[H_F⁻¹]_ii` with `F`
    the inputs from `i` on; what is pruned is made up for by the inputs after it, never by those before.

    Args:
        kernel: `W [in, out]`.
        hessian: `Σ x xᵀ` over inputs, in any units: `(1/m)`, `2/m` and `2` give the same with a relative damping.
        sparsity: Fraction to prune; `round(sparsity · in · out)` weights, spread evenly over the blocks.
        pattern: `(n, m)`: of every `m` consecutive inputs of an output unit `n` are kept; in place of `sparsity`.
        block_size: Inputs among which the mask is chosen at once, unless by a pattern, and after which the rest is
            updated.
        damping: `λ`: a positive number in units of the Hessian, or `Relative(alpha)` of its mean diagonal; raised by
            tens where it is too small for the precision at hand.

    Returns:
        The kernel with survivors moved, in its own dtype, the mask, and the damping used.

    Raises:
        ValueError: Arrays that are not floating, or (outside `jit`) not finite; neither or both of `sparsity` and
            `pattern`; shapes that do not fit; a pattern that does not
            divide `in` or `block_size`; bad sparsity or damping.

    Cost:
        `in³ + in² · out` flops; memory `3in² + 2 · in · out`.

    References:
        Frantar & Alistarh, SparseGPT, 2023 (arXiv 2301.00774), section 3.3 and algorithm 1.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> twins = jnp.ones((2, 2))  # two inputs that always agree: the second takes over
        >>> swept = wj.column_sweep(jnp.array([[1.0], [3.0]]), twins, sparsity=0.5, damping=1e-4)
        >>> swept.kernel.round(2).tolist(), swept.mask.tolist()
        ([[0.0], [4.0]], [[False], [True]])
    """
    kernel, hessian = jnp.asarray(kernel), jnp.asarray(hessian)
    if kernel.ndim != 2 or hessian.shape != (kernel.shape[0],) * 2 or kernel.size == 0:
        raise ValueError(
            f"kernel has shape {kernel.shape} and hessian {hessian.shape}: pass [in, out] and [in, in], not empty."
        )
    for name, array in (("kernel", kernel), ("hessian", hessian)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} is {array.dtype}: pass floats.")
        finite = jnp.all(jnp.isfinite(array))
        if not isinstance(finite, jax.core.Tracer) and not finite:
            raise ValueError(f"{name} holds NaN or infinities: look for them in the parameters and the inputs.")
    if (sparsity is None) == (pattern is None):
        raise ValueError("Pass one of sparsity=, a fraction, and pattern=(n, m), as (2, 4) for 2:4.")
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}: pass at least 1.")
    inputs = kernel.shape[0]
    if sparsity is not None:
        check_sparsity(sparsity)
    if pattern is not None:
        kept, of = pattern
        if not 0 <= kept <= of or of < 1 or inputs % of or block_size % of:
            raise ValueError(
                f"pattern is {pattern} for {inputs} inputs in blocks of {block_size}: pass (n, m) with 0 <= n <= m, "
                "m a divisor of both."
            )
    rule, number = split_damping(damping)
    fraction = 0.0 if sparsity is None else sparsity
    width = min(block_size, inputs)
    ends = jnp.minimum(jnp.arange(width, inputs + width, width), inputs) * kernel.shape[1]
    counts = jnp.diff(prune_count(fraction, ends), prepend=0)  # of each block; together those of the whole
    resolved = jnp.asarray(resolve_damping(rule, number, lambda: jnp.diagonal(hessian)))
    return _sweep(kernel, hessian, counts, resolved, width=width, pattern=pattern)


@partial(jax.jit, static_argnames=("width", "pattern"))
def _sweep(
    kernel: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    counts: Array,
    damping: Float[Array, ""],
    *,
    width: int,
    pattern: tuple[int, int] | None,
) -> SweptKernel:
    inputs = kernel.shape[0]
    blocks = counts.shape[0]
    padding = blocks * width - inputs
    # H = VVᵀ with V upper triangular, the Cholesky factor of H read backwards: U = V⁻¹, and no second factor.
    root, used = inverse_cholesky(hessian[::-1, ::-1].astype(jnp.promote_types(hessian.dtype, jnp.float32)), damping)
    factor = jnp.pad(root[::-1, ::-1], (0, padding))
    factor += jnp.diag((jnp.arange(inputs + padding) >= inputs).astype(factor.dtype))  # inputs that no one depends on
    weights = jnp.pad(kernel.astype(factor.dtype), ((0, padding), (0, 0)))
    real = jnp.arange(inputs + padding) < inputs

    def sweep_block(carry: tuple[Array, Array], block: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        weights, mask = carry
        number, count = block
        first = number * width
        rows = lax.dynamic_slice_in_dim(factor, first, width)
        square = lax.dynamic_slice_in_dim(rows, first, width, axis=1)
        counted = lax.dynamic_slice_in_dim(real, first, width)
        swept, kept, errors = _sweep_rows(
            lax.dynamic_slice_in_dim(weights, first, width), square, counted, count, pattern=pattern
        )
        later = jnp.arange(weights.shape[0]) >= first + width
        weights = weights - jnp.where(later[:, None], contract("ij,io->jo", rows, errors), 0)
        put = partial(lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
        return (put(weights, swept), put(mask, kept)), None

    start = weights, jnp.ones(weights.shape, bool)
    (weights, mask), _ = lax.scan(sweep_block, start, (jnp.arange(blocks), counts))
    mask = mask[:inputs]
    return SweptKernel(jnp.where(mask, weights[:inputs].astype(kernel.dtype), 0), mask, used)


def _sweep_rows(
    weights: Float[Array, "w out"],
    factor: Float[Array, "w w"],
    counted: Bool[Array, " w"],
    count: Array,
    *,
    pattern: tuple[int, int] | None,
) -> tuple[Float[Array, "w out"], Bool[Array, "w out"], Float[Array, "w out"]]:
    # One block: survivors, mask, and the errors to push to the inputs after it.
    width, out = weights.shape
    group = width if pattern is None else pattern[1]
    pivots = jnp.diagonal(factor)

    def choose(now: Array, first: Array) -> Array:
        scores = jnp.square(lax.dynamic_slice_in_dim(now / pivots[:, None], first, group))
        if pattern is None:
            (pruned,) = lowest([jnp.where(counted[:, None], scores, jnp.inf).reshape(1, -1)], [count[None]])
            return ~pruned.reshape(group, out)
        (pruned,) = lowest([scores.T], [jnp.full(out, group - pattern[0])])
        return ~pruned.T

    def sweep_group(carry: tuple[Array, Array, Array], first: Array) -> tuple[tuple[Array, Array, Array], None]:
        now, mask, errors = carry
        mask = lax.dynamic_update_slice_in_dim(mask, choose(now, first), first, 0)

        def visit(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            now, errors = state
            error = jnp.where(mask[i], 0, now[i]) / pivots[i]
            return now - factor[i][:, None] * error, errors.at[i].set(error)  # zero before i: factor is triangular

        now, errors = lax.fori_loop(first, first + group, visit, (now, errors))
        return (now, mask, errors), None

    start = weights, jnp.ones(weights.shape, bool), jnp.zeros_like(weights)
    (now, mask, errors), _ = lax.scan(sweep_group, start, jnp.arange(0, width, group))
    return now, mask, errors
