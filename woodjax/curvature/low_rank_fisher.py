"""Empirical Fisher kept as its gradients: exact for the whole network, never `d × d`.

`F = λI + GᵀG/m` through the `m × m` matrix `mλI + GGᵀ = LLᵀ`; `L⁻¹` is kept.

Memory: `m·nb·b` for the gradients (`m·d` for the whole network), `nb·m²` for the factors.
Flops: about `1.25m²b + 2m³/3` a block to build, `1.25m²b` for the diagonal, `4mb` for a product.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from woodjax import linalg
from woodjax.curvature._blocked import INVERSION_BYTES, Blocked, map_blocks, map_chunks
from woodjax.curvature.damping import (
    ONE_PERCENT,
    Damping,
    Rule,
    check_damping,
    count_raised,
    damping_of_rows,
    split_damping,
)
from woodjax.curvature.protocol import compiled
from woodjax.curvature.sums import Accumulator, accumulate, layout_of, placed_layout
from woodjax.placement import on_any_axes
from woodjax.stream import GradientStream
from woodjax.tree import Layout, is_kernel, wide_dtype
from woodjax.typing import Gradients, Masks, Params, Select, Updates


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["gradients", "whitener", "raised"],
    meta_fields=["layout"],
)
@dataclass(frozen=True)
class LowRankFisher(Blocked):
    """Gradients and the inverse factor of their damped Gram matrix. Made by `low_rank_fisher`."""

    gradients: Float[Array, "m nb b"]
    whitener: linalg.Whitener  # every field with a leading axis [nb]
    raised: Int[Array, ""]  # blocks whose damping was raised

    @property
    def damping(self) -> Float[Array, " nb"]:
        """`λ` of each block, as used: raised where a factor failed."""
        return self.whitener.damping

    def shard_specs(self) -> Self:
        """Gradients are split along their columns; the factor of the whole network is on all devices."""
        factors = PartitionSpec() if self.layout.whole else self.layout.spread(0)
        return replace(
            self,
            gradients=self.layout.spread(1 + self.layout.whole),
            whitener=jax.tree.map(lambda _: factors, self.whitener),
            raised=PartitionSpec(),
        )

    def block_inverse_diagonal(self) -> Float[Array, "nb b"]:
        """`1.25m²b` flops a block, streamed over columns."""
        return map_blocks(linalg.dual_inverse_diagonal, self.gradients, self.whitener)

    def block_solve(self, blocks: Float[Array, "nb b"]) -> Float[Array, "nb b"]:
        """`4mb + 4m²` flops a block."""
        solve = partial(linalg.dual_solve, axes=self.layout.column_axes)
        return map_blocks(solve, self.gradients, self.whitener, blocks)

    def block_matvec(self, blocks: Float[Array, "nb b"]) -> Float[Array, "nb b"]:
        """`4mb` flops a block."""
        products = linalg.contract("mnb,nb->mn", self.gradients, blocks)
        products = linalg.total_over(products, self.layout.column_axes)
        back = linalg.contract("mnb,mn->nb", self.gradients, products)
        return self.damping[:, None] * blocks + back / self.gradients.shape[0]

    def block_compensate(
        self,
        weights: Float[Array, "nb b"],
        kept: Bool[Array, "nb b"],
        gradient: Float[Array, "nb b"] | None,
    ) -> Float[Array, "nb b"]:
        """`m²b + 2m³/3` flops a block: the Gram matrix of the survivors."""
        step = partial(linalg.joint_step_gram, axes=self.layout.column_axes)
        return map_blocks(step, self.gradients, self.damping, weights, kept, gradient)

    @partial(compiled, lead=1)
    def compensate_at(
        self, params: Params, masks: Masks, multiples: Float[Array, " k"], gradient: Params | None = None
    ) -> Updates:
        """`compensate` at several multiples of the damping, from one Gram matrix.

        Args:
            params: A params-tree.
            masks: True = survives.
            multiples: What to multiply the damping with.
            gradient: As in `compensate`.

        Returns:
            A params-tree of steps, leaves `[k, *leaf.shape]`.

        Cost:
            `m²b + k(2m³/3 + 4mb)` flops a block.
        """
        pruned = self.layout.to_blocks(jax.tree.map(jnp.logical_not, masks))
        first_order = None if gradient is None else self.layout.to_blocks(gradient)
        steps = map_blocks(
            partial(linalg.joint_steps_gram, axes=self.layout.column_axes),
            self.gradients,
            self.damping[:, None] * multiples,
            self.layout.to_blocks(params),
            ~pruned,
            first_order,
        )
        return jax.vmap(lambda blocks: self.layout.to_tree(blocks, fill=0), in_axes=1)(steps)

    def submatrices(self, part: int, places: Int[Array, "c q"]) -> Float[Array, "c q q"]:
        """About `1.25m²cq + 2mcq²` flops. Asked of the whole network in one block."""
        return linalg.dual_submatrices(*self._columns(places))

    def costs(self, part: int, places: Int[Array, "c q"], target: Float[Array, "c q"]) -> Float[Array, " c"]:
        """As `submatrices`; about `4m²q + m³/3` flops for a group of more weights than gradients."""
        if places.shape[1] <= self.gradients.shape[0]:
            return super().costs(part, places, target)
        columns, whitener = self._columns(places)
        if len(places) == 1:  # no batch of LAPACK calls where there is one group
            return linalg.dual_group_cost(columns[:, 0], whitener, target[0])[None]
        return jax.vmap(linalg.dual_group_cost, in_axes=(1, None, 0))(columns, whitener, target)

    def group_bytes(self, size: int) -> int:
        """Of the columns, their whitened form and a factor."""
        m = self.gradients.shape[0]
        return 12 * m * size + INVERSION_BYTES * min(m, size) ** 2

    def _columns(self, places: Int[Array, "c q"]) -> tuple[Float[Array, "m c q"], linalg.Whitener]:
        if self.layout.num_blocks > 1:
            raise ValueError(
                "A low-rank Fisher in blocks does not answer for groups: build it with block_size=None, for the whole "
                "network, or use block_fisher."
            )
        columns = jnp.take(self.gradients[:, 0], places, axis=1)
        return columns, jax.tree.map(lambda x: x[0], self.whitener)

    def path_losses(self, params: Params, level: PyTree, num_levels: int) -> Float[Array, " levels"]:
        """Predicted loss change of the joint step at every level of a path of nested masks.

        Args:
            params: A params-tree.
            level: A params-tree of integers: the first level at which a weight is gone.
            num_levels: Levels of the path.

        Returns:
            `[num_levels]`.

        Cost:
            `m²b + num_levels · 2m³/3` flops a block.
        """
        view = self.layout.view
        loss = partial(linalg.path_losses, num_levels=num_levels, axes=view.column_axes)

        def losses(own: Self, params: Params, level: PyTree) -> Float[Array, " levels"]:
            never = jax.tree.map(lambda x: x - num_levels, level)  # padding, 0 in blocks, is never gone
            of_blocks = map_blocks(
                lambda g, damping, w, at: loss(g, damping, w, at + num_levels),
                own.gradients,
                own.damping,
                view.to_blocks(params),
                view.to_blocks(never).astype(jnp.int32),
            )
            return linalg.total_over(jnp.sum(of_blocks, axis=0), () if view.whole else view.mesh_axes)

        trees = self.layout.tree_specs()
        return self.layout.run(losses, (self.shard_specs(), trees, trees), PartitionSpec())(self, params, level)


@partial(jax.tree_util.register_dataclass, data_fields=["rows", "count"], meta_fields=["layout"])
@dataclass(frozen=True)
class GradientRows(Accumulator):
    """The gradients themselves, in blocks; rows that are not filled yet are zero."""

    rows: Float[Array, "capacity nb b"]

    @classmethod
    def init(
        cls,
        params: Params,
        *,
        capacity: int,
        block_size: int | None = None,
        select: Select = is_kernel,
        batch_axes: int = 0,
    ) -> Self:
        """The state before any data.

        Args:
            params: Arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes are read.
            capacity: Rows that there is room for; `merge` adds the capacities of both.
            block_size: As in `low_rank_fisher`.
            select: As in `low_rank_fisher`.
            batch_axes: As in `low_rank_fisher`.

        Returns:
            Zeros.

        Raises:
            ValueError: As `make_layout`; `capacity < 1`.

        Cost:
            Memory `capacity · d`.
        """
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}: pass the number of rows to make room for.")
        layout = placed_layout(params, block_size=block_size, select=select, batch_axes=batch_axes)
        return cls.empty(layout, capacity, wide_dtype(params))

    @classmethod
    def empty(cls, layout: Layout, capacity: int, dtype: DTypeLike = jnp.float32) -> Self:
        """The state before any data, of a layout that is there already."""
        shape = (capacity, layout.num_blocks, layout.block_size)
        return cls(layout, jnp.zeros((), jnp.int32), layout.zeros(shape, dtype, 1 + layout.whole))

    def shard_specs(self) -> Self:
        """Split along the columns."""
        return replace(self, rows=self.layout.spread(1 + self.layout.whole), count=PartitionSpec())

    def add_rows(self, rows: Float[Array, "k nb b"], fresh: Bool[Array, " k"] | None = None) -> Self:
        """Write fresh rows behind those that are there; `k·d` elements, and a copy of the state outside `jit`.

        Args:
            rows: Rows, the fresh ones last.
            fresh: Which of them are new; None for all.

        Returns:
            The new state.
        """
        k = rows.shape[0]
        count = self.count + (k if fresh is None else jnp.sum(fresh, dtype=jnp.int32))
        # Rows that are not fresh repeat the last ones of before: they are written over themselves.
        first = count - k
        return replace(
            self, rows=lax.dynamic_update_slice_in_dim(self.rows, rows.astype(self.rows.dtype), first, 0), count=count
        )

    @property
    def room(self) -> int:
        """The capacity."""
        return self.rows.shape[0]

    def _merged(self, other: Self) -> Self:
        room = self.rows.shape[0] + other.rows.shape[0]
        both = jnp.zeros((room, *self.rows.shape[1:]), self.rows.dtype).at[: self.rows.shape[0]].set(self.rows)
        both = lax.dynamic_update_slice_in_dim(both, other.rows, self.count, 0)
        return replace(self, rows=both, count=self.count + other.count)

    @on_any_axes
    def finalize(self, damping: Damping = ONE_PERCENT, *, held_out: Any = None) -> LowRankFisher:
        """Factor the damped Gram matrix, block by block.

        Args:
            damping: As in `low_rank_fisher`; `"auto"` holds out every other row by itself.
            held_out: None: rows can be told apart, so that none need be set aside.

        Returns:
            A curvature that shares the rows with the state if that is full.

        Raises:
            ValueError: Bad damping; no row added yet; a state that is not full inside `jit`.

        Cost:
            `m²b + 2m³/3` flops a block; a copy of the rows where the state is not full.
        """
        if held_out is not None:
            raise ValueError("GradientRows hold out rows by themselves: merge the two states instead.")
        rows = self.rows
        if isinstance(self.count, jax.core.Tracer):
            raise ValueError("finalize outside jit: how many rows are filled must be known.")
        if self.count == 0:
            raise ValueError("The state has no rows yet: add gradients first.")
        if self.count > rows.shape[0]:
            raise ValueError(f"{int(self.count)} rows were added inside jit to a state with room for {rows.shape[0]}.")
        if self.count < rows.shape[0]:
            rows = rows[: int(self.count)]
        return _factor(self.layout, rows, damping)


@on_any_axes
def low_rank_fisher(
    gradients: Gradients | GradientStream,
    *,
    block_size: int | None = None,
    damping: Damping = ONE_PERCENT,
    select: Select = is_kernel,
    batch_axes: int = 0,
) -> LowRankFisher:
    """Empirical Fisher of the whole network, or of blocks, from its gradients alone.

    Args:
        gradients: Per-example gradients, leaves `[m, *leaf.shape]`, or a stream of them, which is
            written straight into the rows that are kept. `streamed_fisher` keeps none.
        block_size: None for one block over the whole network (no block-diagonal
            approximation), or coordinates in a block `b`, clipped to the largest layer.
        damping: `λ`, not divided by `m`: a positive number in units of squared gradients,
            `Relative(alpha)`, or `"auto"`; see `woodjax.curvature.damping`. Where it is too small for the
            precision at hand it is raised by tens: see the result's `damping` and `raised`.
        select: Which leaves are prunable, asked as `select(path, leaf)`.
        batch_axes: Leading axes that stack layers; no block straddles two layers.

    Returns:
        A curvature.

    Raises:
        ValueError: Damping not positive; gradients of unequal length; a selected leaf that is
            empty or not floating; `block_size < 1`.

    Cost:
        Memory `m·d + nb·m²`; about `m²d + nb·2m³/3` flops.

    References:
        Frantar et al., M-FAC, 2021 (arXiv 2107.03356), static algorithm;
        Benbaki et al., CHITA, 2023 (arXiv 2302.14623), section 3.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> fisher = wj.low_rank_fisher({"w": jnp.array([[[1.0, 0.0]]])}, damping=1.0)
        >>> fisher.inverse_diagonal()["w"].round(3).tolist()
        [[0.5, 1.0]]
    """
    check_damping(damping)
    layout = layout_of(gradients, block_size=block_size, select=select, batch_axes=batch_axes)
    if isinstance(gradients, GradientStream):
        (state,) = accumulate(
            gradients, (GradientRows.empty(layout, gradients.num_rows, wide_dtype(gradients.params)),)
        )
        rows = gradients.microbatches.in_order(state.rows) if isinstance(damping, str) else state.rows
        return _factor(layout, rows, damping)
    return _factor(layout, _to_rows(gradients, layout=layout), damping)


@partial(jax.jit, static_argnames="layout")
def _to_rows(gradients: Gradients, *, layout: Layout) -> Float[Array, "m nb b"]:
    return layout.to_blocks(gradients)


def _factor(layout: Layout, rows: Float[Array, "m nb b"], damping: Damping) -> LowRankFisher:
    rule, number = split_damping(damping)
    whitener, raised = _whiten(rows, number, rule=rule, layout=layout)
    return LowRankFisher(layout, rows, whitener, raised)


@partial(jax.jit, static_argnames=("rule", "layout"))
def _whiten(
    rows: Float[Array, "m nb b"], number: Float[Array, ""] | float, *, rule: Rule, layout: Layout
) -> tuple[linalg.Whitener, Int[Array, ""]]:
    view = layout.view
    grams_of, bytes_each = partial(linalg.gram, axes=view.column_axes), INVERSION_BYTES * rows.shape[0] ** 2

    def factor(rows: Array, number: Array | float) -> tuple[linalg.Whitener, Int[Array, ""]]:
        asked = damping_of_rows(rows, rule, number, view)
        whitener = map_chunks(lambda gram: linalg.whiten(gram, asked), map_blocks(grams_of, rows), bytes_each)
        return whitener, count_raised(whitener.damping, asked, () if view.whole else view.mesh_axes)

    factors = PartitionSpec() if layout.whole else layout.spread(0)
    specs = (layout.spread(1 + layout.whole), PartitionSpec()), (factors, PartitionSpec())
    return layout.run(factor, *specs)(rows, number)
