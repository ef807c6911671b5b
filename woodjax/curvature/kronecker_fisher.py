"""Kronecker-factored Fisher: for a dense layer, second moments of its inputs times those of its output gradients.

The gradient of `W [in, out]` is `a δᵀ`. If `a` and `δ` were independent, its second moment would be `A ⊗ S` with
`A = (1/m) Σ a aᵀ` and `S = (1/m) Σ δ δᵀ`. Damping is split so that the inverse stays a product:
`H = (A + π√λ I) ⊗ (S + √λ/π I)`, `π² = mean diag A / mean diag S`.

A mask has no Kronecker structure. The joint step solves `H_KK δ_K = H_KQ w_Q − ḡ_K` by conjugate gradients,
preconditioned by `[H⁻¹]_KK`, to a residual of 1e-6 of the right-hand side or for 500 iterations. Each lowers the
quadratic, so that a step that was cut short is better than plain removal; `predicted_loss_change` tells what it is
worth.

Memory: `2 Σ (in² + out²)` floats. Flops: `2m(in² + out²)` to build, `2(in³ + out³)` to invert,
`4 · in · out · (in + out)` an iteration.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Bool, Float, Int

from woodjax import linalg
from woodjax.curvature._dense_layers import (
    DenseLayers,
    add_outer,
    damp,
    invert_in_turn,
    layout_of_dense_layers,
    sum_taps,
)
from woodjax.curvature.damping import ONE_PERCENT, Damping, Rule, count_raised, resolve_damping, split_damping
from woodjax.curvature.protocol import compiled
from woodjax.door import checked_but
from woodjax.placement import on_any_axes
from woodjax.stream import GradientStream
from woodjax.tree import Layout, is_kernel, wide_dtype
from woodjax.typing import Masks, Params, Select, Updates

TOLERANCE = 1e-6  # of the residual of a joint step, relative to its right-hand side
MAX_ITERATIONS = 500


class Factors(NamedTuple):
    """`A ⊗ S` of one dense layer, or its inverse."""

    inputs: Float[Array, "in in"]
    outputs: Float[Array, "out out"]

    def product(self, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """`A V S`: `2 · in · out · (in + out)` flops."""
        return linalg.contract("ip,po->io", linalg.contract("ij,jp->ip", self.inputs, matrix), self.outputs)

    def diagonal(self) -> Float[Array, "in out"]:
        """`A_ii S_oo`."""
        return jnp.diagonal(self.inputs)[:, None] * jnp.diagonal(self.outputs)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["factors", "inverses", "damping", "raised"],
    meta_fields=["layout"],
)
@dataclass(frozen=True)
class KroneckerFisher(DenseLayers):
    """Two factors and their inverses for each dense layer. Made by `kronecker_fisher`."""

    factors: list[Factors]  # damping included
    inverses: list[Factors]
    damping: Float[Array, " leaves"]  # as used: the product of the dampings of the two factors
    raised: Int[Array, ""]  # leaves where it was raised

    @compiled
    def inverse_diagonal(self) -> Params:
        """`[A⁻¹]_ii [S⁻¹]_oo`; 0 on leaves that are not prunable."""
        diagonals = [inverse.diagonal() for inverse in self.inverses]
        return self._tree([jnp.where(diagonal > 0, diagonal, jnp.nan) for diagonal in diagonals])

    @compiled
    def solve(self, tree: Params) -> Params:
        """`A⁻¹ V S⁻¹`: `2 · in · out · (in + out)` flops a leaf."""
        return self._tree([x.product(v) for x, v in zip(self.inverses, self._matrices(tree), strict=True)])

    @compiled
    def matvec(self, tree: Params) -> Params:
        """`A V S`: `2 · in · out · (in + out)` flops a leaf."""
        return self._tree([x.product(v) for x, v in zip(self.factors, self._matrices(tree), strict=True)])

    @compiled
    def compensate(self, params: Params, masks: Masks, gradient: Params | None = None) -> Updates:
        """Minimiser of `ḡᵀδ + ½δᵀHδ` with `δ_Q = −w_Q`, by conjugate gradients on the survivors."""
        trees = [self._matrices(tree) for tree in (params, masks, gradient) if tree is not None]
        leaves = zip(self.factors, self.inverses, *trees, strict=True)
        return self._tree([_joint_step(*leaf) for leaf in leaves])


@checked_but("stream")
@on_any_axes
def kronecker_fisher(
    stream: GradientStream, *, damping: Damping = ONE_PERCENT, select: Select = is_kernel
) -> KroneckerFisher:
    """Kronecker-factored (K-FAC) Fisher of the dense layers of a network.

    Args:
        stream: Rows of gradients; its loss decides which Fisher: true labels give the empirical one. Kernels are
            `[in, out]`, as Flax's.
        damping: `λ`: a positive number in units of squared gradients, or `Relative(alpha)` of the mean diagonal of
            `A ⊗ S`. Each factor gets its part of `√λ`; where a part is too small for the precision at hand it is
            raised by tens.
        select: Which leaves are prunable, asked as `select(path, leaf)`: kernels of dense layers.

    Returns:
        A curvature. `H` holds more than `λI`: the split adds `π√λ I ⊗ S + A ⊗ √λ/π I`.

    Raises:
        ValueError: Gradients instead of a stream; a stream with masks; a selected leaf that is not the kernel of
            a dense layer, convolutions among them; damping not positive, or `"auto"`.

    Cost:
        One backward pass an example; memory `2 Σ (in² + out²)`; `2m(in² + out²)` flops a leaf to build and
        `2(in³ + out³)` to invert.

    References:
        Martens & Grosse, K-FAC, 2015 (arXiv 1503.05671), sections 3 and 6.3; for pruning: Wang et al.,
        EigenDamage, 2019 (arXiv 1905.05934), section 3.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> loss = lambda w, x: (x @ w).sum()
        >>> stream = wj.stream_gradients(loss, jnp.ones((1, 1)), jnp.array([[1.0]]))
        >>> wj.kronecker_fisher(stream, damping=1.0).matvec(jnp.ones((1, 1))).tolist()  # (1 + 1)(1 + 1)
        [[4.0]]
    """
    rule, number = split_damping(damping)
    layout = layout_of_dense_layers(stream, select, "kronecker_fisher")
    dtype = wide_dtype(stream.params)
    empty = [Factors(*(jnp.zeros((n, n), dtype) for n in spec.shape)) for spec in layout.selected]
    sums = sum_taps(stream, layout, _add_factors, empty)
    return _invert(sums, stream.num_rows, number, layout=layout, rule=rule)


def _add_factors(total: Factors, inputs: Float[Array, "k in"], output_gradients: Float[Array, "k out"]) -> Factors:
    return Factors(add_outer(total.inputs, inputs), add_outer(total.outputs, output_gradients))


@partial(jax.jit, static_argnames=("layout", "rule"))
def _invert(
    sums: list[Factors], m: int, number: Float[Array, ""] | float, *, layout: Layout, rule: Rule
) -> KroneckerFisher:
    moments: list[Factors] = jax.tree.map(lambda total: total / m, sums)
    asked = jnp.asarray(
        resolve_damping(rule, number, lambda: jnp.concatenate([pair.diagonal().reshape(-1) for pair in moments]))
    )
    parts = [_split(pair, asked) for pair in moments]
    flat = [matrix for pair in moments for matrix in pair]
    results = invert_in_turn(flat, [part for pair in parts for part in pair])
    damped = [damp(matrix, result.damping) for matrix, result in zip(flat, results, strict=True)]
    inverses = [result.inverse for result in results]
    used = jnp.stack([one.damping * other.damping for one, other in zip(results[::2], results[1::2], strict=True)])
    return KroneckerFisher(layout, _pairs(damped), _pairs(inverses), used, count_raised(used, asked))


def _pairs(matrices: list[Float[Array, "n n"]]) -> list[Factors]:
    return [Factors(*pair) for pair in zip(matrices[::2], matrices[1::2], strict=True)]


def _split(moments: Factors, damping: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    inputs, outputs = (jnp.mean(jnp.diagonal(moment)) for moment in moments)
    live = (inputs > 0) & (outputs > 0)
    ratio = jnp.sqrt(jnp.where(live, inputs, 1)) / jnp.sqrt(jnp.where(live, outputs, 1))
    root = jnp.sqrt(damping)
    return root * ratio, root / ratio


def _joint_step(
    factors: Factors,
    inverses: Factors,
    weights: Float[Array, "in out"],
    kept: Bool[Array, "in out"],
    gradient: Float[Array, "in out"] | None = None,
) -> Float[Array, "in out"]:
    removal = jnp.where(kept, 0, -weights).astype(factors.inputs.dtype)
    slope = factors.product(removal) + (0 if gradient is None else gradient)

    def survivors(product: Callable[[Array], Array], x: Array) -> Array:
        return jnp.where(kept, product(x), 0)

    step, _ = cg(  # all vectors are zero on Q
        partial(survivors, factors.product),
        jnp.where(kept, -slope, 0),
        tol=TOLERANCE,
        maxiter=MAX_ITERATIONS,
        M=partial(survivors, inverses.product),
    )
    return jnp.where(kept, step, removal)
