"""Row-block Fisher: one dense block for each output unit, as wide as its fan-in.

For a kernel `W [..., out]` the block of unit `o` is `F_o = λI + (1/m) Σ_i g_io g_ioᵀ` with `g_io` the gradient of
`W[..., o]`. For a dense layer `g_io = δ_io a_i`, so that `F_o = λI + (1/m) Aᵀ diag(δ_o²) A`: inputs and output
gradients are enough, and no gradient of a single example is formed (`woodjax.taps` finds both). Other leaves,
convolutions among them, give their gradients a micro-batch at a time.

Memory: `Σ out · fan_in²` floats for the sums, as much for their means and for the inverses. Flops: `2m · out · fan_in²`
to build, `2 · out · fan_in³` to invert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from woodjax import linalg
from woodjax.curvature._blocked import INVERSION_BYTES, Grouped, after, map_chunks
from woodjax.curvature.damping import ONE_PERCENT, Damping, Rule, count_raised, resolve_damping, split_damping
from woodjax.curvature.protocol import compiled
from woodjax.door import checked_but
from woodjax.placement import on_any_axes
from woodjax.stream import GradientStream
from woodjax.taps import Tap, TapRow, dense_leaves
from woodjax.tree import Layout, is_kernel, make_layout, wide_dtype
from woodjax.typing import Gradients, Masks, Params, Select, Updates

Rows = list[Float[Array, "out fan_in"]]  # one for each selected leaf
Sums = list[Float[Array, "out fan_in fan_in"]]


@partial(jax.tree_util.register_dataclass, data_fields=["inverses", "damping", "raised"], meta_fields=["layout"])
@dataclass(frozen=True)
class RowFisher(Grouped):
    """Inverse row blocks, one array for each prunable leaf. Made by `row_fisher`."""

    inverses: Sums
    damping: Float[Array, " rows"]  # as used, of all rows of all leaves
    raised: Int[Array, ""]  # rows where it was raised

    @compiled
    def damping_tree(self) -> Params:
        """One number for each row."""
        counts = np.cumsum([len(inverse) for inverse in self.inverses])[:-1]
        parts = zip(jnp.split(self.damping, counts), self.inverses, strict=True)
        return self._tree([jnp.broadcast_to(part[:, None], inverse.shape[:2]) for part, inverse in parts])

    @compiled
    def inverse_diagonal(self) -> Params:
        """`[H⁻¹]_qq`; 0 on leaves that are not prunable."""
        rows = [jnp.diagonal(inverse, axis1=1, axis2=2) for inverse in self.inverses]
        return self._tree([jnp.where(row > 0, row, jnp.nan) for row in rows])

    @compiled
    def solve(self, tree: Params) -> Params:
        """`H⁻¹v`: `2 · fan_in²` flops a row."""
        return self._map(lambda inverse, v: linalg.contract("ij,j->i", inverse, v), tree)

    @compiled
    def matvec(self, tree: Params) -> Params:
        """`Hv`, by solving with the inverse: `2fan_in³/3` flops a row."""
        return self._map(jnp.linalg.solve, tree)

    @compiled
    def compensate(self, params: Params, masks: Masks, gradient: Params | None = None) -> Updates:
        """Minimiser of `ḡᵀδ + ½δᵀHδ` with `δ_Q = −w_Q`: `fan_in³/3` flops a row."""
        if gradient is None:
            return self._map(linalg.joint_step_inverse, params, masks)
        return self._map(linalg.joint_step_inverse, params, masks, gradient)

    def group_places(self, leaf: int, groups: Int[Array, "n q"]) -> tuple[int, Int[Array, "n q"]]:
        """A leaf is a part."""
        return sum(spec.selected for spec in self.layout.leaves[:leaf]), groups

    def submatrices(self, part: int, places: Int[Array, "c q"]) -> Float[Array, "c q q"]:
        """Read the entries; zero between weights of different output units."""
        inverse = self.inverses[part]
        row, unit = jnp.divmod(places, len(inverse))
        entries = inverse[unit[:, :, None], row[:, :, None], row[:, None, :]]
        return jnp.where(unit[:, :, None] == unit[:, None, :], entries, 0)

    def _map(self, function: Callable[..., Array], *trees: Params) -> Params:
        operands = zip(self.inverses, *(_rows(self.layout, tree) for tree in trees), strict=True)
        results: Rows = []
        for inverse, *others in operands:  # one leaf after another
            waiting = after(inverse, results[-1]) if results else inverse
            results.append(
                map_chunks(lambda row: function(*row), (waiting, *others), INVERSION_BYTES * inverse[0].size)
            )
        return self._tree(results)

    def _tree(self, rows: Rows) -> Params:
        leaves, found = [], iter(rows)
        for spec in self.layout.leaves:
            moved = (*spec.shape[-1:], *spec.shape[:-1])
            leaves.append(jnp.moveaxis(next(found).reshape(moved), 0, -1) if spec.selected else jnp.zeros(spec.shape))
        return jax.tree.unflatten(self.layout.treedef, leaves)


@checked_but("stream")
@on_any_axes
def row_fisher(stream: GradientStream, *, damping: Damping = ONE_PERCENT, select: Select = is_kernel) -> RowFisher:
    """Inverse empirical Fisher with one block for each output unit of each layer.

    Args:
        stream: Rows of gradients. Kernels have their output units along the last axis, as Flax's have.
        damping: `λ`: a positive number in units of squared gradients, or `Relative(alpha)`.
        select: Which leaves are prunable, asked as `select(path, leaf)`.

    Returns:
        A curvature.

    Raises:
        ValueError: Gradients instead of a stream; damping not positive, or `"auto"`; a selected leaf that is
            empty or not floating.

    Cost:
        Memory up to `4 Σ out · fan_in²`; `2m · out · fan_in²` flops a leaf to build and `2 · out · fan_in³` to
        invert. Dense layers: `m · (in + out)` numbers in place of `m · in · out`.

    References:
        The row blocks of Frantar & Alistarh, OBC, 2022 (arXiv 2208.11580), with the Fisher of the loss in
        place of the layer's own Hessian; `Aᵀ diag(δ²) A` as in Dong et al., L-OBS, 2017 (arXiv 1705.07565).

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> loss = lambda w, x: (x @ w).sum()
        >>> stream = wj.stream_gradients(loss, jnp.ones((2, 1)), jnp.array([[1.0, 0.0]]))
        >>> wj.row_fisher(stream, damping=1.0).inverse_diagonal().round(3).tolist()
        [[0.5], [1.0]]
    """
    if not isinstance(stream, GradientStream):
        raise ValueError("row_fisher takes a stream of gradients: pass woodjax.stream_gradients(...).")
    rule, number = split_damping(damping)
    layout = make_layout(stream.params, select=select)
    if scalars := [spec.path for spec in layout.selected if not spec.shape]:
        raise ValueError(f"Leaves {scalars} have no axis for output units: leave them out by select=.")
    return _invert(row_sums(stream, layout), stream.masks, stream.num_rows, number, layout=layout, rule=rule)


@partial(jax.jit, static_argnames=("layout", "rule"))
def _invert(
    sums: Sums, masks: Masks | None, m: int, number: Float[Array, ""] | float, *, layout: Layout, rule: Rule
) -> RowFisher:
    fishers = [total / m for total in sums]
    if masks is not None:
        kept = _rows(layout, masks)
        fishers = [jnp.where(k[:, :, None] & k[:, None, :], f, 0) for k, f in zip(kept, fishers, strict=True)]
    diagonals = [jnp.diagonal(fisher, axis1=1, axis2=2).reshape(-1) for fisher in fishers]
    asked = resolve_damping(rule, number, lambda: jnp.concatenate(diagonals))
    results: list[linalg.DampedInverse] = []
    for fisher in fishers:  # one leaf after another
        waiting = after(fisher, results[-1].damping) if results else fisher
        results.append(
            map_chunks(lambda block: linalg.fisher_inverse(block, asked), waiting, INVERSION_BYTES * fisher[0].size)
        )
    used = jnp.concatenate([result.damping for result in results])
    raised = count_raised(used, asked)
    return RowFisher(layout, [result.inverse for result in results], used, raised)


def row_sums(stream: GradientStream, layout: Layout) -> Sums:
    """`Σ g gᵀ` for each output unit of each selected leaf.

    Args:
        stream: Rows of gradients; its masks are left to the caller.
        layout: Which leaves are selected.

    Returns:
        `[out, fan_in, fan_in]` for each selected leaf.

    Cost:
        `2m · out · fan_in²` flops a leaf, in micro-batches.
    """
    numbers = tuple(number for number, spec in enumerate(layout.leaves) if spec.selected)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stream.rows)
    row = stream.loss_row
    tapped = set(dense_leaves(row.loss, stream.params, example)) & set(numbers)
    dtype = wide_dtype(stream.params)
    shapes = [(spec.shape[-1], spec.size // spec.shape[-1]) for spec in layout.selected]
    empty = [jnp.zeros((out, fan_in, fan_in), dtype) for out, fan_in in shapes]
    return stream.fold(_AddRows(numbers), empty, row=TapRow(row, tuple(sorted(tapped))))


@dataclass(frozen=True)
class _AddRows:
    """Adds a micro-batch to the sums, from taps where there are any."""

    numbers: tuple[int, ...]

    def __call__(self, sums: Sums, found: Gradients, numbers: Int[Array, " k"], fresh: Bool[Array, " k"]) -> Sums:
        gradients, taps = found
        leaves = jax.tree.leaves(gradients)
        return [
            _add_tap(total, taps[number], fresh) if number in taps else _add_gradients(total, leaves[number], fresh)
            for total, number in zip(sums, self.numbers, strict=True)
        ]


def _add_tap(total: Float[Array, "out fan_in fan_in"], tap: Tap, fresh: Bool[Array, " k"]) -> Array:
    inputs = tap.inputs.astype(total.dtype)
    deltas = jnp.where(fresh[:, None], tap.output_gradient, 0).astype(total.dtype)

    def unit(operands: tuple[Array, Array]) -> Array:
        block, delta = operands
        scaled = inputs * delta[:, None]
        return block + linalg.contract("ki,kj->ij", scaled, scaled)

    return lax.map(unit, (total, deltas.T))


def _add_gradients(total: Float[Array, "out fan_in fan_in"], gradient: Array, fresh: Bool[Array, " k"]) -> Array:
    out, fan_in, _ = total.shape
    rows = gradient.reshape(-1, fan_in, out).astype(total.dtype)
    rows = jnp.where(fresh[:, None, None], rows, 0)
    return lax.map(lambda at: at[0] + linalg.contract("ki,kj->ij", at[1], at[1]), (total, jnp.moveaxis(rows, 2, 0)))


def _rows(layout: Layout, tree: Params) -> Rows:
    jax.eval_shape(layout.to_blocks, tree)  # checks structure and shapes
    return [
        jnp.moveaxis(leaf, -1, 0).reshape(spec.shape[-1], -1)
        for spec, leaf in zip(layout.leaves, layout.flatten(tree), strict=True)
        if spec.selected
    ]
