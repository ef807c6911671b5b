"""Empirical Fisher of the whole network whose gradients are never held: computed again when asked for.

The same mathematics as `LowRankFisher`. What needs columns of `G` (the Gram matrix, the diagonal) takes
a window of columns `[m, w]` at a time, every window one pass over the examples. What needs products
with `G` needs no gradients of single examples at all: `Gv` is forward mode, `Gᵀu` is one ordinary
gradient of a weighted loss.

Memory: `m·w + m²` and one micro-batch. Time: `d/w` passes over the examples for the Gram matrix, for the
diagonal and for a joint update; one pass for a product.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from woodjax import linalg
from woodjax.curvature.damping import (
    ONE_PERCENT,
    Damping,
    check_halves,
    count_raised,
    resolve_damping,
    spectrum_of_grams,
    split_damping,
)
from woodjax.curvature.diagonal_fisher import DiagonalSums
from woodjax.curvature.sums import accumulate, layout_of
from woodjax.door import checked_but
from woodjax.placement import Microbatches, on_any_axes
from woodjax.stream import GradientStream
from woodjax.tree import Layout, is_kernel, wide_dtype
from woodjax.typing import Gradients, Masks, Params, Select, Updates


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["stream", "whitener", "raised"],
    meta_fields=["layout", "window_size"],
)
@dataclass(frozen=True)
class StreamedFisher:
    """A stream of gradients and the inverse factor of their damped Gram matrix. Made by `streamed_fisher`."""

    layout: Layout
    window_size: int  # columns w held at once, on each device
    stream: GradientStream
    whitener: linalg.Whitener
    raised: Int[Array, ""]  # 1 if the damping was raised

    @property
    def damping(self) -> Float[Array, ""]:
        """`λ` as used: raised where the factor failed."""
        return self.whitener.damping

    @on_any_axes
    def inverse_diagonal(self) -> Params:
        """`[H⁻¹]_qq`; 0 on leaves that are not prunable. `d/w` passes."""
        diagonal = self.layout.zeros((self.layout.block_size,), self.whitener.root.dtype, 0)
        columns = _empty_window(self.stream, self.layout, self.window_size)
        for start in _starts(self.layout, self.window_size):
            columns = _window(self.stream, self.layout, start, columns)
            diagonal = _write_diagonal(diagonal, columns, self.whitener, start, layout=self.layout)
        return self._tree(jnp.where(diagonal > 0, diagonal, jnp.nan))

    @on_any_axes
    def solve(self, tree: Params) -> Params:
        """`H⁻¹v`; 0 on leaves that are not prunable. One forward and one backward pass."""
        vector = self._selected(tree)
        dual = linalg.solve_whitened(self.whitener, self.stream.products(vector))
        back = self._selected(self.stream.combine(dual))
        return jax.tree.map(lambda v, b: (v - b) / self.damping, vector, back)

    @on_any_axes
    def matvec(self, tree: Params) -> Params:
        """`Hv`; 0 on leaves that are not prunable. One forward and one backward pass."""
        vector = self._selected(tree)
        back = self._selected(self.stream.combine(self.stream.products(vector)))
        return jax.tree.map(lambda v, b: self.damping * v + b / self.stream.num_rows, vector, back)

    @on_any_axes
    def compensate(self, params: Params, masks: Masks, gradient: Params | None = None) -> Updates:
        """Minimiser of `ḡᵀδ + ½δᵀHδ` with `δ_Q = −w_Q`: `d/w` passes for the Gram matrix, two more for the step."""
        kept = self.layout.to_blocks(masks)[0]
        whitener = linalg.whiten(_gram(self.stream, self.layout, self.window_size, kept), self.damping)
        weights, survivors = self.layout.to_blocks(params)[0], None
        residual = self.stream.products(self._tree(jnp.where(kept, 0, weights)))
        if gradient is not None:
            survivors = jnp.where(kept, self.layout.to_blocks(gradient)[0], 0) / whitener.damping
            residual += self.stream.products(self._tree(survivors))
        step = self.layout.to_blocks(self.stream.combine(linalg.solve_whitened(whitener, residual)))[0]
        if survivors is not None:
            step -= survivors
        return self._tree(jnp.where(kept, step, -weights))

    def _selected(self, tree: Params) -> Params:
        return self._tree(self.layout.to_blocks(tree)[0])

    def _tree(self, flat: Float[Array, " d"]) -> Params:
        return self.layout.to_tree(flat[None], fill=0)


@checked_but("stream")
@on_any_axes
def streamed_fisher(
    stream: GradientStream,
    *,
    window_size: int,
    damping: Damping = ONE_PERCENT,
    select: Select = is_kernel,
    batch_axes: int = 0,
) -> StreamedFisher:
    """Empirical Fisher of the whole network in little memory: the gradients are computed again when asked for.

    Args:
        stream: Rows of gradients.
        window_size: Columns `w` of `G` held at once, on each device, clipped to `d`. Every question that needs
            columns takes `d/w` passes over the examples; the answers are those of `low_rank_fisher`.
        damping: As in `low_rank_fisher`.
        select: Which leaves are prunable, asked as `select(path, leaf)`.
        batch_axes: Leading axes that stack layers.

    Returns:
        A curvature.

    Raises:
        ValueError: Bad damping; `window_size < 1`; a selected leaf that is empty or not floating.

    Cost:
        Memory `m·w + 3m²` and one micro-batch of gradients; `d/w` passes over the examples and about
        `m²d + 2m³/3` flops.

    References:
        The dual form of Frantar et al., M-FAC, 2021 (arXiv 2107.03356), with recomputed gradients.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> loss = lambda w, x: 0.5 * (w @ x).sum() ** 2
        >>> stream = wj.stream_gradients(loss, jnp.ones((1, 2)), jnp.array([[1.0, 0.0]]))
        >>> wj.streamed_fisher(stream, window_size=1, damping=1.0).inverse_diagonal().tolist()
        [[0.5, 1.0]]
    """
    rule, number = split_damping(damping)
    if window_size < 1:
        raise ValueError(f"window_size is {window_size}: pass at least 1 column.")
    layout = layout_of(stream, block_size=None, select=select, batch_axes=batch_axes)
    width = min(window_size, layout.view.block_size)
    if isinstance(damping, str):
        check_halves(stream.num_rows)
    stream = stream.precise()
    matrix = _gram(stream, layout, width, None)

    def squares() -> Float[Array, "1 d"]:
        (sums,) = accumulate(stream, (DiagonalSums.empty(layout),))
        return sums.squares / sums.count

    asked = resolve_damping(rule, number, squares, lambda live: spectrum_of_grams(matrix[None], live))
    whitener = linalg.whiten(matrix, asked)
    return StreamedFisher(layout, width, stream, whitener, count_raised(whitener.damping, asked))


def _gram(stream: GradientStream, layout: Layout, width: int, kept: Bool[Array, " d"] | None) -> Float[Array, "m m"]:
    columns = _empty_window(stream, layout, width)
    total = jnp.zeros((stream.num_rows, stream.num_rows), columns.dtype)
    for start in _starts(layout, width):
        columns = _window(stream, layout, start, columns)
        total += _window_gram(columns, kept, start, layout=layout)
    return total


@partial(jax.jit, static_argnames="layout")
def _window_gram(
    columns: Float[Array, "m w"], kept: Bool[Array, " d"] | None, start: int, *, layout: Layout
) -> Float[Array, "m m"]:
    def gram(columns: Array, kept: Array | None, start: Array) -> Array:
        first, fresh = _span(layout, start, columns.shape[1])
        if kept is not None:
            fresh &= lax.dynamic_slice_in_dim(kept, first, columns.shape[1])
        return linalg.gram(columns, fresh, axes=layout.view.column_axes)

    here = PartitionSpec()
    flags = here if kept is None else layout.spread(0)
    return layout.run(gram, (layout.spread(1), flags, here), here)(columns, kept, start)


@partial(jax.jit, static_argnames="layout", donate_argnums=0)
def _write_diagonal(
    diagonal: Float[Array, " d"], columns: Float[Array, "m w"], whitener: linalg.Whitener, start: int, *, layout: Layout
) -> Float[Array, " d"]:
    def write(diagonal: Array, columns: Array, whitener: linalg.Whitener, start: Array) -> Array:
        first, _ = _span(layout, start, columns.shape[1])
        part = linalg.dual_inverse_diagonal(columns, whitener)
        return lax.dynamic_update_slice_in_dim(diagonal, part, first, 0)

    here, own = PartitionSpec(), layout.spread(0)
    return layout.run(write, (own, layout.spread(1), here, here), own)(diagonal, columns, whitener, start)


def _starts(layout: Layout, width: int) -> range:
    """First columns of the windows; on several devices, of those of every one."""
    return range(0, layout.view.block_size, width)


def _span(layout: Layout, start: Array, width: int) -> tuple[Array, Bool[Array, " w"]]:
    # The first column of a window, and which come after `start`: the last window overlaps the one before.
    first = jnp.minimum(start, layout.view.block_size - width)
    return first, first + jnp.arange(width) >= start


def _empty_window(stream: GradientStream, layout: Layout, width: int) -> Float[Array, "m w"]:
    devices = layout.block_size // layout.view.block_size
    return layout.zeros((stream.num_rows, devices * width), wide_dtype(stream.params), 1)


def _window(stream: GradientStream, layout: Layout, start: int, buffer: Float[Array, "m w"]) -> Float[Array, "m w"]:
    # The memory of the buffer, whatever is in it, is taken over: there is never more than one window.
    columns, _ = stream.fold(_FillWindow(layout, stream.microbatches), (buffer, jnp.asarray(start)))
    return columns


@dataclass(frozen=True)
class _FillWindow:
    """Writes the window's columns of a micro-batch of gradients."""

    layout: Layout
    cut: Microbatches

    def __call__(
        self, state: tuple[Array, Array], gradients: Gradients, numbers: Int[Array, " k"], fresh: Bool[Array, " k"]
    ) -> tuple[Array, Array]:
        del fresh  # rows that were seen before are written over themselves
        columns, start = state

        def fill(columns: Array, gradients: Gradients, start: Array, numbers: Array) -> Array:
            width = columns.shape[1]
            wanted = self.layout.view.window(gradients, _span(self.layout, start, width)[0], width)
            return self.cut.put(columns, wanted.astype(columns.dtype), self.cut.start_of(numbers))

        here, own = PartitionSpec(), self.layout.spread(1)
        run = self.layout.run(fill, (own, self.layout.gradient_specs(), here, here), own)
        return run(columns, gradients, start, numbers), start
