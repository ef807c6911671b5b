"""The additive life of a low-rank Fisher: the gradients themselves, row by row."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from woodjax.curvature.damping import (
    ONE_PERCENT,
    Damping,
)
from woodjax.curvature.low_rank import LowRankFisher, factored
from woodjax.curvature.sums import Accumulator, placed_layout
from woodjax.placement import on_any_axes
from woodjax.tree import Layout, is_kernel, wide_dtype
from woodjax.typing import Params, Select


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
        """The state before any data, of a layout that is there already.

        Args:
            layout: Cuts parameters into blocks.
            capacity: Rows that there is room for.
            dtype: Of the rows.

        Returns:
            The state without rows.
        """
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
        return factored(self.layout, rows, damping)
