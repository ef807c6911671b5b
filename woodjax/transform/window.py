"""A window of the last gradients that the optimizer saw, kept as rows of an empirical Fisher.

No batch is set aside and no backward pass is added: the gradients of training are the rows. They are means over
mini-batches, at the weights of the step at which they were seen; a pruned coordinate is zero in all of them when
they are used. With a memory budget, a row is the sum of several gradients in turn, each with a random sign: the
cross terms cancel in expectation, so that `E[RᵀR] = Σ g gᵀ`.

| size | meaning |
|---|---|
| `m` | gradients in the window |
| `k` | rows that are kept, `k = m` without a budget |
| `r` | gradients in a row, `⌈m/k⌉` |
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from woodjax.curvature import low_rank_fisher
from woodjax.door import checked
from woodjax.stages import CurvatureFn
from woodjax.tree import is_kernel, path_name
from woodjax.typing import Gradients, Params, PyTree, Select


class WindowState(NamedTuple):
    """Rows of the gradients seen, arrays only."""

    rows: PyTree  # a params-tree of `[k, *leaf.shape]`; leaves that are not kept are [k]
    filled: Int[Array, " k"]  # gradients summed in each row
    seen: Int[Array, ""]  # gradients written so far


@dataclass(frozen=True, eq=False)
class GradientWindow:
    """How gradients are kept, and made a curvature. Made by `gradient_window`."""

    size: int
    curvature: CurvatureFn
    select: Select
    dtype: DTypeLike | None
    memory_budget: int | None
    examples_per_gradient: int

    def kept(self, tree: PyTree) -> tuple[bool, ...]:
        """For each leaf of a params-tree, is its gradient kept?

        Args:
            tree: Arrays or shapes.

        Returns:
            One answer for each leaf.
        """
        return tuple(
            bool(self.select(path_name(path), jax.ShapeDtypeStruct(x.shape, x.dtype))) and x.size > 0
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        )

    def init(self, params: Params) -> WindowState:
        """The window before any gradient; survives an empty tree.

        Args:
            params: A params-tree; only shapes and types are read.

        Returns:
            The state without gradients.

        Raises:
            ValueError: One row takes more than the memory budget.
        """
        leaves, treedef = jax.tree.flatten(params)
        kept, k = self.kept(params), self.size
        dtypes = [jnp.dtype(self.dtype or jnp.promote_types(x.dtype, jnp.float32)) for x in leaves]
        row_bytes = sum(x.size * t.itemsize for x, t, keep in zip(leaves, dtypes, kept, strict=True) if keep)
        if self.memory_budget is not None and row_bytes:
            k = min(k, self.memory_budget // row_bytes)
            if k < 1:
                raise ValueError(
                    f"memory_budget is {self.memory_budget} bytes, one row of gradients takes {row_bytes}: pass more, "
                    "or dtype=jnp.bfloat16, or select= fewer leaves."
                )
            k = math.ceil(self.size / math.ceil(self.size / k))  # no more rows than the gradients of the window fill
        rows = [
            jnp.broadcast_to(jnp.zeros_like(x, dtype=t), (k, *x.shape))
            if keep
            else jnp.zeros(k, t)  # not empty: Orbax refuses that
            for x, t, keep in zip(leaves, dtypes, kept, strict=True)
        ]
        return WindowState(jax.tree.unflatten(treedef, rows), jnp.zeros(k, jnp.int32), jnp.zeros((), jnp.int32))

    def add(self, state: WindowState, gradient: Params) -> WindowState:
        """The window with one more gradient, in the place of the oldest.

        Args:
            state: The window.
            gradient: A params-tree.

        Returns:
            The new state.
        """
        k = state.filled.shape[0]
        in_a_row = math.ceil(self.size / k)
        row, turn = state.seen // in_a_row % k, state.seen % in_a_row

        def write(rows: Float[Array, "k ..."], g: Float[Array, "..."], keep: bool) -> Float[Array, "k ..."]:
            if not keep:
                return rows
            new = g.astype(jnp.promote_types(g.dtype, jnp.float32))
            if in_a_row > 1:
                old = lax.dynamic_index_in_dim(rows, row, keepdims=False)
                new = jnp.where(turn == 0, 0, old) + _sign(state.seen) * new
            return lax.dynamic_update_index_in_dim(rows, new.astype(rows.dtype), row, 0)

        leaves, treedef = jax.tree.flatten(state.rows)
        flat = zip(leaves, jax.tree.leaves(gradient), self.kept(gradient), strict=True)
        written = jax.tree.unflatten(treedef, [write(*leaf) for leaf in flat])
        filled = state.filled.at[row].set(turn + 1)
        return WindowState(written, filled, state.seen + 1)

    def gradients(self, state: WindowState, params: Params) -> Gradients:
        """Rows `[k, *leaf.shape]` whose mean outer product is that of the gradients seen, times `s`.

        A row that is not finite is left out, as are those not filled yet.

        Args:
            state: The window.
            params: A params-tree; only shapes are read.

        Returns:
            Gradients; zero in leaves that are not kept.
        """
        leaves, treedef = jax.tree.flatten(params)
        rows, used = self._usable(state)
        k = state.filled.shape[0]
        scale = jnp.sqrt(k * self.examples_per_gradient / jnp.maximum(jnp.sum(jnp.where(used, state.filled, 0)), 1))
        full = [
            scale * x_rows if keep else jnp.zeros((k, *x.shape))
            for x_rows, x, keep in zip(rows, leaves, self.kept(params), strict=True)
        ]
        return jax.tree.unflatten(treedef, full)

    def mean_gradient(self, state: WindowState, params: Params) -> Params:
        """Mean of the gradients seen, for windows without a memory budget: signs would cancel it.

        Args:
            state: The window.
            params: A params-tree; only shapes are read.

        Returns:
            A params-tree; zero in leaves that are not kept.
        """
        leaves, treedef = jax.tree.flatten(params)
        rows, used = self._usable(state)
        count = jnp.maximum(jnp.sum(jnp.where(used, state.filled, 0)), 1)
        means = [
            jnp.sum(x_rows, axis=0) / count if keep else jnp.zeros(x.shape)
            for x_rows, x, keep in zip(rows, leaves, self.kept(params), strict=True)
        ]
        return jax.tree.unflatten(treedef, means)

    def _usable(self, state: WindowState) -> tuple[list[Float[Array, "k ..."]], Bool[Array, " k"]]:
        # Rows in at least float32, zero where one is not finite, and which are not.
        wide = [rows.astype(jnp.promote_types(rows.dtype, jnp.float32)) for rows in jax.tree.leaves(state.rows)]
        finite = [jnp.all(jnp.isfinite(rows), axis=tuple(range(1, rows.ndim))) for rows in wide]
        used = jnp.all(jnp.stack(finite), axis=0)
        return [jnp.where(used.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0) for rows in wide], used


@checked
def gradient_window(
    size: int,
    *,
    curvature: CurvatureFn = low_rank_fisher,
    select: Select = is_kernel,
    dtype: DTypeLike | None = None,
    memory_budget: int | None = None,
    examples_per_gradient: int = 1,
) -> GradientWindow:
    """Keep the last gradients of training, for `prune_transform(..., fisher=gradient_window(64))`.

    Args:
        size: Gradients `m` in the window.
        curvature: From gradients to a curvature.
        select: Which leaves are kept; the others are not pruned. The leaves that the curvature selects
            must be among them.
        dtype: Of the rows; None for float32. `jnp.bfloat16` halves the memory.
        memory_budget: Bytes for the rows, below which gradients are summed into fewer rows with random signs.
        examples_per_gradient: Examples `s` in a mini-batch. A mean over `s` examples has a covariance `s` times
            smaller than a gradient of one: rows are scaled by `√s`. It does not change which weights go with a
            relative damping, but it does change predicted losses and what an absolute damping means.

    Returns:
        A description, without arrays.

    Raises:
        ValueError: A size, budget or number of examples below 1.

    Cost:
        Memory `k·d`. One row read and written a step; jit the update and donate its state, or all rows are
        copied.

    References:
        Frantar et al., M-FAC, 2021 (arXiv 2107.03356), section 3.2 (dynamic algorithm: the window); Charikar, Chen
        & Farach-Colton, Finding frequent items in data streams, 2002 (random signs).

    Example:
        >>> import optax, woodjax as wj
        >>> schedule = wj.cubic_schedule(begin=100, end=1000, every=100, target=0.9)
        >>> tx = wj.prune_transform(optax.adam(1e-3), schedule=schedule, fisher=wj.gradient_window(64))
    """
    for name, value in (("size", size), ("examples_per_gradient", examples_per_gradient)):
        if value < 1:
            raise ValueError(f"{name} is {value}: pass at least 1.")
    return GradientWindow(size, curvature, select, dtype, memory_budget, examples_per_gradient)


def _sign(number: Int[Array, ""]) -> Float[Array, ""]:
    # The sign of a gradient is a function of its number: a resumed run draws the same.
    draw: Any = jax.random.bernoulli(jax.random.fold_in(jax.random.key(0), number))
    return jnp.where(draw, 1.0, -1.0)
