"""Pruning of one kernel from the moments of its inputs: magnitude, Wanda, and SparseGPT's sweep."""

from functools import partial
from typing import Literal, NamedTuple, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from woodjax import linalg
from woodjax.column_sweep import SweptKernel, column_sweep
from woodjax.curvature.damping import Damping, Relative, check_damping
from woodjax.layerwise.kernels import KernelView
from woodjax.patterns import NM
from woodjax.ranking import lowest
from woodjax.sparsities import ExactSparsity, check_sparsity, exact_sparsity, prune_count

Method = Literal["magnitude", "wanda", "sweep"]


class PrunedKernel(NamedTuple):
    """What a method leaves of a kernel."""

    kernel: Float[Array, "..."]  # in the shape and dtype of the leaf, exactly zero where pruned
    mask: Bool[Array, "..."]  # True = survives
    kept: Int[Array, ""]
    finite: Bool[Array, "2"]  # were the kernel and the moments?
    damping: Float[Array, " groups"] | None  # as used
    error: Float[Array, ""] | None  # of the outputs: squared, relative


class PruneRule(NamedTuple):
    """How every kernel is pruned."""

    method: Method
    sparsity: float | None
    pattern: NM | None
    damping: Relative | float
    block_size: int

    @classmethod
    def of(
        cls,
        method: Method,
        sparsity: float | None,
        pattern: NM | None,
        damping: Damping,
        block_size: int,
        *,
        weighted: bool,
    ) -> Self:
        """Check the options of `prune_layers`.

        Args:
            method: Which.
            sparsity: Fraction to prune, or None.
            pattern: Or an N:M pattern.
            damping: For the sweep.
            block_size: For the sweep.
            weighted: Whether there are output gradients.

        Returns:
            A rule, hashable.

        Raises:
            ValueError: Options that do not go together.
        """
        if (sparsity is None) == (pattern is None):
            raise ValueError("Pass one of sparsity=, a fraction, and pattern=, such as woodjax.NM(2, 4).")
        if pattern is not None and not isinstance(pattern, NM):
            raise ValueError(f"pattern is {pattern!r}: pass woodjax.NM(n, m), such as woodjax.NM(2, 4).")
        if method not in get_args(Method):
            raise ValueError(f"method is {method!r}: choose one of {list(get_args(Method))}.")
        if method == "magnitude" and weighted:
            raise ValueError("output_gradients: magnitude looks at no data, pass them to 'wanda' or 'sweep'.")
        if sparsity is not None:
            check_sparsity(sparsity)
        if block_size < 1 or (pattern is not None and block_size % pattern.m):
            raise ValueError(f"block_size is {block_size}: pass at least 1, and a multiple of m of an N:M pattern.")
        check_damping(damping)
        if isinstance(damping, str):
            raise ValueError("damping is 'auto', which needs held-out gradients: pass a number or woodjax.Relative.")
        number = damping if isinstance(damping, Relative) else float(damping)
        return cls(method, None if sparsity is None else float(sparsity), pattern, number, block_size)


def prune_kernel(
    leaf: Float[Array, "..."], view: KernelView, moments: Float[Array, "groups in ..."] | None, rule: PruneRule
) -> PrunedKernel:
    """Prune a kernel.

    Args:
        leaf: The kernel `W`.
        view: How it is a matrix `[in, out]`.
        moments: `Σ s x xᵀ` for each group of neighbouring output units; for Wanda their diagonals, for magnitude None.
        rule: How.

    Returns:
        The kernel, of which `round(sparsity · in · out)` weights are gone.

    Cost:
        The sweep: `groups · in³ + in² · out` flops. The others: 33 passes.
    """
    inputs, outputs = view.matrix_shape(leaf.shape)
    rows = {"sweep": 1 if moments is None else len(moments), "wanda": outputs, "magnitude": 1}[rule.method]
    counts = None
    if rule.sparsity is not None:  # as even over the rows as whole numbers can be; together those of the whole
        ends = prune_count(rule.sparsity, jnp.arange(rows + 1) * (inputs * outputs // rows))
        counts = np.diff(np.asarray(ends))
    static = rule._replace(sparsity=None)  # another sparsity is not another program
    if rule.method != "sweep" or moments is None:
        return _cut(leaf, moments, counts, view=view, rule=static)
    fractions = None
    if counts is not None:
        exact = [exact_sparsity(int(count) * rows / (inputs * outputs)) for count in counts]
        heads, tails = zip(*exact, strict=True)
        fractions = ExactSparsity(jnp.array(heads, jnp.int32), jnp.array(tails, jnp.float32))
    return _sweep(leaf, moments, fractions, view=view, rule=static)


@partial(jax.jit, static_argnames=("view", "rule"))
def _sweep(
    leaf: Float[Array, "..."],
    moments: Float[Array, "groups in in"],
    fractions: ExactSparsity | None,
    *,
    view: KernelView,
    rule: PruneRule,
) -> PrunedKernel:
    kernel = view.to_matrix(leaf)
    groups, inputs, _ = moments.shape
    parts = jnp.moveaxis(kernel.reshape(inputs, groups, -1), 1, 0)
    pattern = None if rule.pattern is None else (rule.pattern.n, rule.pattern.m)

    def one(group: tuple[Array, Array, ExactSparsity | None]) -> tuple[SweptKernel, Array, Array]:
        part, hessian, fraction = group
        options = {"sparsity": fraction, "damping": rule.damping, "block_size": rule.block_size}
        swept = column_sweep(part, hessian, pattern=pattern, **options)
        change = (swept.kernel - part).astype(hessian.dtype)
        return swept, _energy(change, hessian), _energy(part.astype(hessian.dtype), hessian)

    # One after another: a factorisation is all that a device wants to hold.
    swept, lost, whole = lax.map(one, (parts, moments, fractions))
    error = jnp.sum(lost) / jnp.maximum(jnp.sum(whole), jnp.finfo(lost.dtype).tiny)
    moved, mask = (jnp.moveaxis(x, 0, 1).reshape(kernel.shape) for x in swept[:2])
    return _pruned(leaf, moved, mask, moments, view)._replace(damping=swept.damping, error=error)


def _energy(change: Float[Array, "in out"], hessian: Float[Array, "in in"]) -> Float[Array, ""]:
    return jnp.sum(change * linalg.contract("ij,jo->io", hessian, change))


@partial(jax.jit, static_argnames=("view", "rule"))
def _cut(
    leaf: Float[Array, "..."],
    squares: Float[Array, "groups in"] | None,
    counts: Int[Array, " rows"] | None,
    *,
    view: KernelView,
    rule: PruneRule,
) -> PrunedKernel:
    kernel = view.to_matrix(leaf)
    scores = jnp.abs(kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)))
    if squares is not None:
        norms = jnp.sqrt(squares).astype(scores.dtype).T
        scores = scores * jnp.repeat(norms, kernel.shape[1] // norms.shape[1], axis=1)
    if rule.pattern is not None:
        n, m = rule.pattern.n, rule.pattern.m
        runs = jnp.moveaxis(scores.reshape(-1, m, kernel.shape[1]), 1, 2)
        (pruned,) = lowest([runs.reshape(-1, m)], [jnp.full(kernel.size // m, m - n)])
        pruned = jnp.moveaxis(pruned.reshape(runs.shape), 2, 1).reshape(kernel.shape)
    elif rule.method == "wanda":
        (pruned,) = lowest([scores.T], [jnp.asarray(counts)])
        pruned = pruned.T
    else:
        (pruned,) = lowest([view.to_leaf(scores, leaf).reshape(1, -1)], [jnp.asarray(counts)])
        pruned = view.to_matrix(pruned.reshape(leaf.shape))
    return _pruned(leaf, jnp.where(pruned, 0, kernel), ~pruned, squares, view)


def _pruned(
    leaf: Array, kernel: Float[Array, "in out"], mask: Bool[Array, "in out"], moments: Array | None, view: KernelView
) -> PrunedKernel:
    sound = jnp.array(True) if moments is None else jnp.all(jnp.isfinite(moments))
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)), sound])
    kept = jnp.sum(mask, dtype=jnp.int32)
    return PrunedKernel(view.to_leaf(kernel, leaf), view.to_leaf(mask, leaf), kept, finite, None, None)
