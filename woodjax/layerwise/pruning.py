"""Pruning of one kernel from the moments of its inputs: magnitude, Wanda, and SparseGPT's sweep."""

from functools import partial
from typing import Literal, NamedTuple, Self, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from woodjax import linalg
from woodjax.column_sweep import SweptKernel, column_sweep
from woodjax.curvature.damping import Damping, Relative, check_damping
from woodjax.masks import ExactSparsity, check_sparsity, exact_sparsity, prune_count
from woodjax.patterns import NM
from woodjax.ranking import lowest

Method = Literal["magnitude", "wanda", "sweep"]


class PrunedKernel(NamedTuple):
    """What a method leaves of a kernel."""

    kernel: Float[Array, "in out"]  # exactly zero where pruned
    mask: Bool[Array, "in out"]  # True = survives
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


def check_kernels(matrices: dict[str, Float[Array, "in out"]], pattern: NM | None) -> None:
    """Raise unless the kernels can be pruned.

    Args:
        matrices: By path.
        pattern: To be followed, or None.

    Raises:
        ValueError: NaN or infinities; inputs that the pattern does not divide.
    """
    finite = jax.device_get({path: jnp.all(jnp.isfinite(w)) for path, w in matrices.items()})
    if lost := [path for path, value in finite.items() if not value]:
        raise ValueError(f"Kernels {lost} hold NaN or infinities: look for a training that diverged.")
    for path, matrix in matrices.items():
        if pattern is not None and matrix.shape[0] % pattern.m:
            raise ValueError(
                f"Kernel '{path}' reads {matrix.shape[0]} inputs, no multiple of {pattern.m} for {pattern.n}:"
                f"{pattern.m}: leave it out by select=."
            )


def prune_kernel(
    kernel: Float[Array, "in out"], moments: Float[Array, "groups in ..."] | None, rule: PruneRule
) -> PrunedKernel:
    """Prune a kernel.

    Args:
        kernel: `W [in, out]`.
        moments: `Σ s x xᵀ` for each group of neighbouring output units; for Wanda their diagonals, for magnitude None.
        rule: How.

    Returns:
        The kernel in its own dtype; `round(sparsity · in · out)` weights are gone.

    Cost:
        The sweep: `groups · in³ + in² · out` flops. The others: 33 passes.
    """
    method, sparsity, pattern, damping, block_size = rule
    inputs, outputs = kernel.shape
    if method == "sweep" and moments is not None:
        groups = moments.shape[0]
        fractions = None
        if sparsity is not None:
            size = inputs * outputs // groups
            counts = jax.device_get(_differences(sparsity, groups, size))
            exact = [exact_sparsity(int(count) / size) for count in counts]
            fractions = jax.tree.map(lambda *x: jnp.asarray(x), *exact)
        return _sweep(kernel, moments, fractions, damping=damping, pattern=pattern, block_size=block_size)
    if pattern is not None:
        return _cut_pattern(kernel, moments, pattern=pattern)
    rows, size = (outputs, inputs) if method == "wanda" else (1, inputs * outputs)  # that are ranked by themselves
    return _cut(kernel, moments, _differences(sparsity or 0.0, rows, size))


def _differences(sparsity: float, rows: int, size: int) -> Int[Array, " rows"]:
    # As even as whole numbers can be; together those of the whole.
    return jnp.diff(prune_count(sparsity, jnp.arange(1, rows + 1) * size), prepend=0)


@partial(jax.jit, static_argnames=("damping", "pattern", "block_size"))
def _sweep(
    kernel: Float[Array, "in out"],
    moments: Float[Array, "groups in in"],
    fractions: ExactSparsity | None,
    *,
    damping: Relative | float,
    pattern: NM | None,
    block_size: int,
) -> PrunedKernel:
    groups, inputs, _ = moments.shape
    parts = jnp.moveaxis(kernel.reshape(inputs, groups, -1), 1, 0)
    options = {"pattern": None if pattern is None else (pattern.n, pattern.m), "block_size": block_size}

    def one(group: tuple[Array, Array, ExactSparsity | None]) -> tuple[SweptKernel, Array, Array]:
        part, hessian, fraction = group
        swept = column_sweep(part, hessian, sparsity=fraction, damping=damping, **options)
        change = (swept.kernel - part).astype(hessian.dtype)
        return swept, _energy(change, hessian), _energy(part.astype(hessian.dtype), hessian)

    # One after another: a factorisation is all that a device wants to hold.
    swept, lost, whole = lax.map(one, (parts, moments, fractions))
    error = jnp.sum(lost) / jnp.maximum(jnp.sum(whole), jnp.finfo(lost.dtype).tiny)
    kernel, mask = (jnp.moveaxis(x, 0, 1).reshape(kernel.shape) for x in swept[:2])
    return PrunedKernel(kernel, mask, swept.damping, error)


def _energy(change: Float[Array, "in out"], hessian: Float[Array, "in in"]) -> Float[Array, ""]:
    return jnp.sum(change * linalg.contract("ij,jo->io", hessian, change))


@jax.jit
def _cut(
    kernel: Float[Array, "in out"], squares: Float[Array, "groups in"] | None, counts: Int[Array, " rows"]
) -> PrunedKernel:
    scores = _scores(kernel, squares)
    if len(counts) == 1:
        (pruned,) = lowest([scores.reshape(1, -1)], [counts])
        return _without(kernel, pruned.reshape(kernel.shape))
    (pruned,) = lowest([scores.T], [counts])
    return _without(kernel, pruned.T)


@partial(jax.jit, static_argnames="pattern")
def _cut_pattern(
    kernel: Float[Array, "in out"], squares: Float[Array, "groups in"] | None, *, pattern: NM
) -> PrunedKernel:
    inputs, outputs = kernel.shape
    runs = jnp.moveaxis(_scores(kernel, squares).reshape(-1, pattern.m, outputs), 1, 2).reshape(-1, pattern.m)
    (pruned,) = lowest([runs], [jnp.full(len(runs), pattern.m - pattern.n)])
    return _without(kernel, jnp.moveaxis(pruned.reshape(-1, outputs, pattern.m), 1, 2).reshape(inputs, outputs))


def _scores(kernel: Float[Array, "in out"], squares: Float[Array, "groups in"] | None) -> Float[Array, "in out"]:
    scores = jnp.abs(kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)))
    if squares is None:
        return scores
    norms = jnp.sqrt(squares).astype(scores.dtype).T
    return scores * jnp.repeat(norms, kernel.shape[1] // norms.shape[1], axis=1)


def _without(kernel: Float[Array, "in out"], pruned: Bool[Array, "in out"]) -> PrunedKernel:
    return PrunedKernel(jnp.where(pruned, 0, kernel), ~pruned, None, None)
