"""Optimal Brain Surgeon as it was meant: one weight at a time, the others moved after each, in every block.

Each removal leaves a smaller problem whose inverse is a rank-1 downdate away. The order and the losses of the
whole way down are recorded, so that one cut through all blocks serves every sparsity.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from woodjax import linalg
from woodjax.compensation import compensate
from woodjax.curvature import BlockFisher
from woodjax.curvature._blocked import map_chunks
from woodjax.door import checked
from woodjax.masks import make_masks
from woodjax.placement import on_any_axes
from woodjax.sparsities import Sparsity, check_sparsity
from woodjax.tree import check_bool, check_like
from woodjax.typing import Masks, Params, Updates

LARGEST_BLOCK = 256  # the trace takes 4b³ flops a block, one row of the inverse after another


class ExactObsInfo(NamedTuple):
    """The way down of every block, and where it was cut. Made by `exact_obs`."""

    order: Int[Array, "nb b"]  # coordinates of the block in the order of removal; −1 where none is left
    losses: Float[Array, "nb b"]  # predicted loss change after that removal and all before it
    removed: Int[Array, " nb"]  # how many of them went
    predicted_loss_change: Float[Array, ""]  # of all blocks together


@checked
@on_any_axes
def exact_obs(
    params: Params, fisher: BlockFisher, sparsity: Sparsity, *, previous: Masks | None = None
) -> tuple[Masks, Updates, ExactObsInfo]:
    """Prune greedily, one weight at a time with exact updates, inside each block of a block Fisher.

    What a removal costs is priced given all removals before it, so that of two weights that do the same work only
    one is cheap. The blocks share one threshold on these costs, made not to fall along a block's order.

    Args:
        params: A params-tree of floating leaves.
        fisher: Blocks of at most 256 coordinates: `block_fisher(gradients, block_size=128)`.
        sparsity: Fraction to prune, or a mapping from leaf path to fraction, as in `make_masks`.
        previous: Masks of an earlier step: what they pruned goes first and counts.

    Returns:
        Masks, True = survives; updates for `optax.apply_updates`, the exact joint update of these masks, which is
        where the sequence of single updates ends; and the trace.

    Raises:
        ValueError: Blocks larger than 256; a mapping with blocks that cross leaves (`block_size=None`); bad
            sparsity or masks; scores that are not finite (outside `jit`).

    Cost:
        `4b³` flops a block for the whole trace (`b` downdates), `b³/3` for the update; memory one copy of the
        inverse of each block in work, and `8d` bytes for the trace.

    References:
        Frantar & Alistarh, OBC, 2022 (arXiv 2208.11580), algorithm 1 (ExactOBS) and its global trace;
        Kuznedelev et al., CAP, 2022 (arXiv 2210.09223), for Fisher blocks.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> fisher = wj.block_fisher({"w": jnp.array([[[1.0, 1.0, 0.5]]])}, damping=0.01)  # the first two are twins
        >>> masks, updates, info = wj.exact_obs({"w": jnp.array([[1.0, 1.1, 0.5]])}, fisher, 1 / 3)
        >>> masks["w"].tolist(), info.order.tolist()
        ([[True, True, False]], [[2, 0, 1]])
    """
    layout = fisher.layout
    if layout.block_size > LARGEST_BLOCK:
        raise ValueError(
            f"Blocks have {layout.block_size} coordinates: exact_obs takes at most {LARGEST_BLOCK}, pass "
            "block_size=128 to block_fisher."
        )
    if layout.whole and isinstance(sparsity, Mapping):
        raise ValueError("sparsity is a mapping, but the block crosses leaves: pass a block_size to block_fisher.")
    check_sparsity(sparsity)
    if previous is not None:
        check_like(previous, params, "previous")
        check_bool(previous, "previous")
    scores, order, losses = _trace(params, fisher, previous)
    masks = make_masks(scores, sparsity, previous=previous)
    masks, updates, info = _cut(params, masks, fisher, order, losses)
    if previous is not None:  # also on leaves that are not prunable
        masks = jax.tree.map(jnp.logical_and, masks, previous)
        updates = jax.tree.map(lambda u, w, mask: jnp.where(mask, u, -w), updates, params, masks)
    return masks, updates, info


@jax.jit
def _trace(
    params: Params, fisher: BlockFisher, previous: Masks | None
) -> tuple[Params, Int[Array, "nb b"], Float[Array, "nb b"]]:
    layout, view = fisher.layout, fisher.layout.view

    def trace(
        params: Params, inverse: Float[Array, "nb b b"], previous: Masks | None
    ) -> tuple[Params, Int[Array, "nb b"], Float[Array, "nb b"]]:
        real = view.to_blocks(jax.tree.map(lambda w: jnp.ones(jnp.shape(w), bool), params))  # False on padding
        kept = real if previous is None else view.to_blocks(previous)
        tiers = jnp.where(real, jnp.where(kept, 1, 0), 2)
        order, increments = map_chunks(
            lambda block: linalg.greedy_trace(*block),
            (inverse, view.to_blocks(params), tiers),
            8 * layout.block_size**2,
        )
        before = jnp.take_along_axis(tiers, order, axis=1) == 0
        rising = jax.lax.cummax(jnp.where(before, 0, increments), axis=1)
        rows = jnp.arange(order.shape[0])[:, None]
        by_weight = (
            jnp.zeros_like(rising).at[rows, jnp.where(order < 0, order.shape[1], order)].set(rising, mode="drop")
        )
        return view.to_tree(by_weight, fill=jnp.inf), order, jnp.cumsum(increments, axis=1)

    tree, blocks = layout.tree_specs(), layout.spread(0)
    given = (tree, blocks, PartitionSpec() if previous is None else tree)
    return layout.run(trace, given, (tree, blocks, blocks))(params, fisher.inverse, previous)


@jax.jit
def _cut(
    params: Params, masks: Masks, fisher: BlockFisher, order: Int[Array, "nb b"], losses: Float[Array, "nb b"]
) -> tuple[Masks, Updates, ExactObsInfo]:
    layout, view = fisher.layout, fisher.layout.view

    def cut(
        masks: Masks, order: Int[Array, "nb b"], losses: Float[Array, "nb b"]
    ) -> tuple[Masks, Int[Array, " nb"], Float[Array, ""]]:
        pruned = view.to_blocks(jax.tree.map(jnp.logical_not, masks))
        removed = jnp.sum(pruned, axis=1)
        # Equal costs are cut by their place in the order, not by their index: as many of each block, the first ones.
        first = jnp.arange(order.shape[1]) < removed[:, None]
        rows = jnp.arange(order.shape[0])[:, None]
        chosen = jnp.zeros_like(pruned).at[rows, jnp.where(first, order, order.shape[1])].set(True, mode="drop")
        last = jnp.take_along_axis(losses, jnp.maximum(removed - 1, 0)[:, None], axis=1)[:, 0]
        predicted = linalg.total_over(jnp.sum(jnp.where(removed > 0, last, 0)), view.mesh_axes)
        return view.to_tree(~chosen, fill=True), removed, predicted

    tree, blocks = layout.tree_specs(), layout.spread(0)
    run = layout.run(cut, (tree, blocks, blocks), (tree, blocks, PartitionSpec()))
    masks, removed, predicted = run(masks, order, losses)
    return masks, compensate(params, masks, fisher), ExactObsInfo(order, losses, removed, predicted)
