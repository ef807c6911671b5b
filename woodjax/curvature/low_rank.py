"""Empirical Fisher kept as its gradients: exact for the whole network, never `d × d`.

`F = λI + GᵀG/m` through the `m × m` matrix `mλI + GGᵀ = LLᵀ`; `L⁻¹` is kept.

Memory: `m·nb·b` for the gradients (`m·d` for the whole network), `nb·m²` for the factors.
Flops: about `1.25m²b + 2m³/3` a block to build, `1.25m²b` for the diagonal, `4mb` for a product.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from woodjax import linalg
from woodjax.curvature._blocked import INVERSION_BYTES, Blocked, map_blocks, map_chunks
from woodjax.curvature.damping import (
    Damping,
    Rule,
    count_raised,
    damping_of_rows,
    split_damping,
)
from woodjax.curvature.protocol import compiled
from woodjax.tree import Layout
from woodjax.typing import Masks, Params, PyTree, Updates


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


def factored(layout: Layout, rows: Float[Array, "m nb b"], damping: Damping) -> LowRankFisher:
    """The curvature of rows of gradients, factored.

    Args:
        layout: Of the rows.
        rows: Gradients in blocks.
        damping: As in `low_rank_fisher`.

    Returns:
        A curvature.

    Raises:
        ValueError: As `low_rank_fisher`.

    Cost:
        About `m²b + 2m³/3` flops a block.
    """
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
