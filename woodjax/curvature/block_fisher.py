"""Block-diagonal empirical Fisher with dense inverse blocks: WoodFisher's curvature.

`F = λI + (1/m) Σ gᵢgᵢᵀ` inside each block of `b` coordinates, zero between blocks.

Memory: `nb·b²` for the sums, as much for the inverse, `m·nb·b` for gradients that are held.
Flops: those of the engine, for each block; see `woodjax.linalg`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from woodjax import linalg
from woodjax.curvature._blocked import INVERSION_BYTES, Blocked, map_blocks, map_chunks
from woodjax.curvature.damping import (
    ONE_PERCENT,
    Damping,
    Rule,
    check_damping,
    count_raised,
    damping_of_rows,
    resolve_damping,
    spectrum_of_sums,
    split_damping,
)
from woodjax.curvature.sums import Accumulator, check_finalize, layout_of, only_fresh, placed_layout, sum_up
from woodjax.door import checked
from woodjax.placement import ShardedLayout, on_any_axes
from woodjax.stream import GradientStream
from woodjax.tree import Layout, is_kernel, wide_dtype
from woodjax.typing import Gradients, Params, Select

Engine = Literal["auto", "scan", "rank_k", "primal", "dual"]


def _as_asked(scan: Callable[..., Array]) -> Callable[..., linalg.DampedInverse]:
    return lambda gradients, damping: linalg.DampedInverse(scan(gradients, damping), jnp.asarray(damping))


# Rows to block size from which on the primal form is the fastest: measured on CPU by benchmarks/engines.py.
PRIMAL_FROM = 0.9

ROW_ENGINES = {  # primal is not here: it goes through the sums
    "scan": _as_asked(linalg.woodbury_scan),
    "rank_k": _as_asked(linalg.woodbury_scan_rank_k),
    "dual": linalg.dual_inverse,
}


@partial(jax.tree_util.register_dataclass, data_fields=["inverse", "damping", "raised"], meta_fields=["layout"])
@dataclass(frozen=True)
class BlockFisher(Blocked):
    """Inverse Fisher blocks `[nb, b, b]`. Made by `block_fisher`, or `BlockSums.finalize`."""

    inverse: Float[Array, "nb b b"]
    damping: Float[Array, " nb"]  # as used: raised where a factor failed
    raised: Int[Array, ""]  # blocks where it was raised

    def shard_specs(self) -> Self:
        """All is split along the blocks."""
        blocks = self.layout.spread(0)
        return replace(self, inverse=blocks, damping=blocks, raised=PartitionSpec())

    def block_inverse_diagonal(self) -> Float[Array, "nb b"]:
        """Read the diagonals."""
        return jnp.diagonal(self.inverse, axis1=-2, axis2=-1)

    def block_solve(self, blocks: Float[Array, "nb b"]) -> Float[Array, "nb b"]:
        """`2b²` flops a block."""
        return linalg.contract("nij,nj->ni", self.inverse, blocks)

    def block_matvec(self, blocks: Float[Array, "nb b"]) -> Float[Array, "nb b"]:
        """Solve with the inverse: `2b³/3` flops a block."""
        return self._map(jnp.linalg.solve, blocks)

    def block_compensate(
        self,
        weights: Float[Array, "nb b"],
        kept: Bool[Array, "nb b"],
        gradient: Float[Array, "nb b"] | None,
    ) -> Float[Array, "nb b"]:
        """`b³/3` flops a block."""
        return self._map(linalg.joint_step_inverse, weights, kept, gradient)

    def submatrices(self, part: int, places: Int[Array, "c q"]) -> Float[Array, "c q q"]:
        """Read the entries; zero between weights of different blocks."""
        block, place = jnp.divmod(places, self.layout.block_size)
        entries = self.inverse[block[:, :, None], place[:, :, None], place[:, None, :]]
        return jnp.where(block[:, :, None] == block[:, None, :], entries, 0)

    def _map(self, function: Callable[..., Array], *per_block: Array | None) -> Float[Array, "nb b"]:
        return map_chunks(
            lambda block: function(*block), (self.inverse, *per_block), INVERSION_BYTES * self.inverse[0].size
        )


@partial(jax.tree_util.register_dataclass, data_fields=["sums", "count"], meta_fields=["layout"])
@dataclass(frozen=True)
class BlockSums(Accumulator):
    """Sums of outer products `Σ g gᵀ`, block by block: `[nb, b, b]`."""

    sums: Float[Array, "nb b b"]

    @classmethod
    def init(
        cls, params: Params, *, block_size: int | None = 128, select: Select = is_kernel, batch_axes: int = 0
    ) -> Self:
        """The state before any data.

        Args:
            params: Arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes are read.
            block_size: As in `block_fisher`.
            select: As in `block_fisher`.
            batch_axes: As in `block_fisher`.

        Returns:
            Zeros.

        Raises:
            ValueError: As `make_layout`.

        Cost:
            Memory `nb·b²`.

        Example:
            >>> import jax.numpy as jnp, woodjax as wj
            >>> monday = wj.BlockSums.init(jnp.ones((1, 2))).add(jnp.array([[[1.0, 0.0]]]))
            >>> tuesday = wj.BlockSums.init(jnp.ones((1, 2))).add(jnp.array([[[0.0, 1.0]]]))
            >>> monday.merge(tuesday).finalize(0.5).inverse_diagonal().tolist()
            [[1.0, 1.0]]
        """
        layout = placed_layout(params, block_size=block_size, select=select, batch_axes=batch_axes)
        return cls.empty(layout, wide_dtype(params))

    @classmethod
    def empty(cls, layout: Layout, dtype: DTypeLike = jnp.float32) -> Self:
        """The state before any data, of a layout that is there already.

        Args:
            layout: Cuts parameters into blocks.
            dtype: Of the sums.

        Returns:
            The state without rows.
        """
        b = layout.block_size
        return cls(layout, jnp.zeros((), jnp.int32), layout.zeros((layout.num_blocks, b, b), dtype, 0))

    def shard_specs(self) -> Self:
        """Split along the blocks."""
        return replace(self, sums=self.layout.spread(0), count=PartitionSpec())

    def add_rows(self, rows: Float[Array, "k nb b"], fresh: Bool[Array, " k"] | None = None) -> Self:
        """`2kb²` flops a block."""
        rows, new = only_fresh(rows, fresh)
        specs = (self.layout.spread(1), self.layout.spread(0)), self.layout.spread(0)
        sums = self.layout.run(partial(map_blocks, _add_outer), *specs)(rows, self.sums)
        return replace(self, sums=sums, count=self.count + new)

    def add_gradients(self, gradients: Gradients, fresh: Bool[Array, " k"] | None = None) -> Self:
        """As `add_rows`; sums travel between devices, not rows, where there are fewer numbers in them."""
        layout, k = self.layout, jax.tree.leaves(gradients)[0].shape[0]
        # Of a weight, b numbers travel in sums, and as many as a device has rows in gradients.
        if not isinstance(layout, ShardedLayout) or k <= layout.block_size * layout.row_devices:
            return super().add_gradients(gradients, fresh)
        if fresh is not None:
            gradients = jax.tree.map(lambda g: jnp.where(fresh.reshape(-1, *(1,) * (g.ndim - 1)), g, 0), gradients)
        specs = (layout.gradient_specs(),), layout.spread(0)
        new = layout.run(partial(layout.view.sums, outer=_outer_sums), *specs)(gradients)
        return replace(
            self, sums=self.sums + new, count=self.count + (k if fresh is None else jnp.sum(fresh, dtype=jnp.int32))
        )

    def _merged(self, other: Self) -> Self:
        return replace(self, sums=self.sums + other.sums, count=self.count + other.count)

    @on_any_axes
    def finalize(self, damping: Damping = ONE_PERCENT, *, held_out: Self | None = None) -> BlockFisher:
        """Invert, block by block.

        Args:
            damping: As in `block_fisher`.
            held_out: For `damping="auto"`, and only then: sums of other examples, on which the damping is
                chosen. They are merged into the result.

        Returns:
            A curvature.

        Raises:
            ValueError: Bad damping; `"auto"` without held-out sums; no row added yet.

        Cost:
            `2b³` flops a block, and about `10b³` for `"auto"`; memory `nb·b²`.
        """
        check_finalize(self, damping, held_out)
        rule, number = split_damping(damping)
        return _invert_sums(self, held_out, number, rule=rule)


@checked
@on_any_axes
def block_fisher(
    gradients: Gradients | GradientStream,
    *,
    block_size: int | None = 128,
    damping: Damping = ONE_PERCENT,
    engine: Engine = "auto",
    select: Select = is_kernel,
    batch_axes: int = 0,
) -> BlockFisher:
    """Inverse empirical Fisher, block by block.

    Args:
        gradients: Per-example gradients, leaves `[m, *leaf.shape]`, or a stream of them, which is
            summed up (engine `"primal"`) and not held where there are at least `0.9b` rows.
        block_size: Coordinates in a block `b`, clipped to the largest layer. Blocks are
            contiguous in the row-major flattened leaf and do not cross leaves. None for one block of the
            whole network.
        damping: `λ`, not divided by `m`: a positive number in units of squared gradients,
            `Relative(alpha)`, or `"auto"`; see `woodjax.curvature.damping`. Where it is too small for the
            precision at hand the engines with a Cholesky factor raise it by tens: see the result's
            `damping` and `raised`.
        engine: How the inverse is made: `"scan"` (the paper's rank-1 recursion), `"rank_k"`,
            `"primal"` (Cholesky of the block), `"dual"` (Cholesky of the Gram matrix), or
            `"auto"`: primal if `m >= 0.9b`, else dual. All give the same matrix up to rounding.
        select: Which leaves are prunable, asked as `select(path, leaf)`.
        batch_axes: Leading axes that stack layers; no block straddles two layers.

    Returns:
        A curvature.

    Raises:
        ValueError: Unknown engine, or one that cannot stream; damping not positive; gradients of unequal
            length; a selected leaf that is empty or not floating; `block_size < 1`.

    Cost:
        Memory `2nb·b²` and a workspace, and `m·nb·b` for held gradients; `"auto"` damping takes three times as
        much. Flops per block as in `woodjax.linalg`.

    References:
        Singh & Alistarh, WoodFisher, 2020 (arXiv 2004.14340), equations 5 and 6.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> fisher = wj.block_fisher({"w": jnp.array([[[1.0, 3.0]]])}, block_size=1, damping=1.0)
        >>> fisher.inverse_diagonal()["w"].round(3).tolist()  # 1 / (1 + g²)
        [[0.5, 0.10000000149011612]]
    """
    check_damping(damping)
    if engine not in ("auto", "primal", *ROW_ENGINES):
        raise ValueError(f"engine is {engine!r}: choose one of {['auto', 'primal', *ROW_ENGINES]}.")
    streamed = isinstance(gradients, GradientStream)
    layout = layout_of(gradients, block_size=block_size, select=select, batch_axes=batch_axes)
    m = gradients.num_rows if streamed else jax.tree.leaves(gradients)[0].shape[0]
    if engine == "auto":
        engine = "primal" if m >= PRIMAL_FROM * layout.block_size else "dual"
        if streamed and engine == "dual":
            gradients, streamed = gradients.collect(), False  # fewer numbers than the inverse has
    if engine == "primal":
        return sum_up(gradients, partial(BlockSums.empty, layout, wide_dtype(gradients)), damping)
    if streamed:
        raise ValueError(f"engine {engine!r} needs the gradients themselves: pass stream.collect(), or 'primal'.")
    rule, number = split_damping(damping)
    return _invert_rows(gradients, number, layout=layout, engine=engine, rule=rule)


def _add_outer(rows: Float[Array, "k b"], total: Float[Array, "b b"]) -> Float[Array, "b b"]:
    return total + linalg.contract("mi,mj->ij", rows, rows)


def _outer_sums(rows: Float[Array, "k n b"]) -> Float[Array, "n b b"]:
    b = rows.shape[-1]
    return map_blocks(_add_outer, rows, jnp.zeros((rows.shape[1], b, b), rows.dtype))


@partial(jax.jit, static_argnames="rule")
def _invert_sums(
    sums: BlockSums, held_out: BlockSums | None, number: Float[Array, ""] | float, *, rule: Rule
) -> BlockFisher:
    layout, view = sums.layout, sums.layout.view

    def invert(
        sums: BlockSums, held_out: BlockSums | None, number: Array | float
    ) -> tuple[linalg.DampedInverse, Int[Array, ""]]:
        whole = sums if held_out is None else sums.merge(held_out)
        other = sums if held_out is None else held_out
        spectrum = partial(spectrum_of_sums, sums.sums / sums.count, other.sums / other.count)
        asked = resolve_damping(
            rule,
            number,
            lambda: jnp.diagonal(whole.sums, axis1=1, axis2=2) / whole.count,
            None if view.mesh_axes else spectrum,
            view.mesh_axes,
        )
        bytes_each = INVERSION_BYTES * view.block_size**2
        result = map_chunks(lambda b: linalg.fisher_inverse(b / whole.count, asked), whole.sums, bytes_each)
        return result, count_raised(result.damping, asked, view.mesh_axes)

    specs = sums.shard_specs()
    result, raised = layout.run(
        invert,
        (specs, specs if held_out is not None else PartitionSpec(), PartitionSpec()),
        (layout.spread(0), PartitionSpec()),
    )(sums, held_out, number)
    return BlockFisher(layout, result.inverse, result.damping, raised)


@partial(jax.jit, static_argnames=("layout", "engine", "rule"))
def _invert_rows(
    gradients: Gradients, number: Float[Array, ""] | float, *, layout: Layout, engine: Engine, rule: Rule
) -> BlockFisher:
    def invert(rows: Array, number: Array | float) -> tuple[linalg.DampedInverse, Int[Array, ""]]:
        asked = damping_of_rows(rows, rule, number, layout.view)
        result = map_blocks(lambda g: ROW_ENGINES[engine](g, asked), rows)
        return result, count_raised(result.damping, asked, layout.view.mesh_axes)

    specs = (layout.spread(1), PartitionSpec()), (layout.spread(0), PartitionSpec())
    result, raised = layout.run(invert, *specs)(layout.to_blocks(gradients), number)
    return BlockFisher(layout, result.inverse, result.damping, raised)
