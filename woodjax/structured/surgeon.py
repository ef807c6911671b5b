"""Optimal Brain Surgeon for channels: what it costs to lose one after all other weights have moved, and that move.

`Q` are all weights of a channel, in all leaves. It leaves by the weights `R ⊂ Q` that read it, `δ_R = −w_R`; the
others of `Q` are as good as gone, and may not move to make up for it: `δ = 0`. So the constraint is `δ_Q = −t_Q` with
`t` the weights on `R` and 0 on the rest, and the cost `½ t_Qᵀ([H⁻¹]_QQ)⁻¹t_Q` is exact for the quadratic model.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from woodjax.compensation import compensate
from woodjax.curvature import CoupledCurvature, Curvature
from woodjax.door import checked, checked_but
from woodjax.structured.channels import ChannelGroup, ChannelGroups, ChannelScores, Kept, LeafChannels
from woodjax.structured.matching import match
from woodjax.structured.plan import make_plan
from woodjax.structured.reads import among, check_reads, members, reading_places, where_removed
from woodjax.tree import check_like
from woodjax.typing import Params, Updates


@checked_but("curvature")
def obs_channel_scores(
    groups: ChannelGroups, params: Params, curvature: CoupledCurvature, *, gradient: Params | None = None
) -> ChannelScores:
    """Exact joint cost of every channel: the loss increase of removing it, the others moved.

    Args:
        groups: From `channel_groups`.
        params: The parameters that the curvature was made for.
        curvature: Stands for `H`: a low-rank Fisher of the whole network sees what other layers can make up for;
            rows from `all_class_gradients` make it the Gauss–Newton matrix. Block and row Fishers and diagonals
            have no correlations between their parts. Leaves that it holds fixed belong to no channel.
        gradient: Mean gradient `ḡ` for a network that is not at a minimum; the change common to all channels,
            `−½ ḡᵀH⁻¹ḡ`, is left out.

    Returns:
        Scores `[n]` for each group, in units of the loss, without what damping costs a channel itself: rounding may
        make them slightly negative. `+inf` where the curvature holds all readers fixed.

    Raises:
        ValueError: A curvature that does not answer for groups over several leaves; trees that differ; a group
            whose readers are not among `params`.

    Cost:
        For a low-rank Fisher about `4m²q + m³/3` flops for each channel of `q` weights; the memory of one.

    References:
        Hassibi & Stork 1992, for groups; Kurtić et al., oBERT, 2022 (arXiv 2203.07259), section 3; Kurtić et al.,
        ZipLM, 2023 (arXiv 2302.04089), section 3, for structures of one layer.

    Example:
        >>> import jax, jax.numpy as jnp, woodjax as wj
        >>> params = {"a": jnp.ones((1, 2)), "b": jnp.array([[1.0], [2.0]])}
        >>> groups = wj.channel_groups(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 1)))
        >>> fisher = wj.diagonal_fisher(jax.tree.map(lambda w: jnp.ones((1, *w.shape)), params), damping=1.0)
        >>> wj.obs_channel_scores(groups, params, fisher)["a"].tolist()  # ½ · 1 · w², by the reader alone
        [0.5, 2.0]
    """
    if not isinstance(curvature, CoupledCurvature):
        raise ValueError(
            f"{type(curvature).__name__} does not answer for groups over several leaves: take low_rank_fisher of the "
            "whole network, block_fisher, row_fisher or diagonal_fisher."
        )
    shapes = [jax.ShapeDtypeStruct(spec.shape, jnp.float32) for spec in curvature.layout.leaves]
    check_like(params, jax.tree.unflatten(curvature.layout.treedef, shapes), "params")
    reads = reading_places(groups)
    check_reads(reads, params)
    held = [spec.selected for spec in curvature.layout.leaves]
    described = [leaf for leaf, _, _ in match(groups.leaves, params)]
    readers = [leaf for leaf, _, _ in match(reads.leaves, params)]
    leaves = [
        (whole, read) if whole is not None and read is not None and selected else None
        for whole, read, selected in zip(described, readers, held, strict=True)
    ]
    newton = None if gradient is None else jax.tree.leaves(curvature.solve(gradient))
    damping = jax.tree.leaves(curvature.damping_tree())
    scores = {}
    for group in groups.groups:
        at, own = zip(*(_places(pair, group) for pair in leaves), strict=True)
        if not any(mask.any() for mask in own):
            scores[group.name] = jnp.full(group.size, jnp.inf)
            continue
        targets, ridge = [], jnp.zeros(group.size)
        for number, (w, places, mask) in enumerate(zip(jax.tree.leaves(params), at, own, strict=True)):
            target = jnp.where(mask, jnp.reshape(w, -1)[places], 0).astype(jnp.result_type(w, jnp.float32))
            ridge = ridge + 0.5 * jnp.sum(jnp.reshape(damping[number], -1)[places] * target**2, axis=1)
            targets.append(target if newton is None else target - jnp.reshape(newton[number], -1)[places])
        tree = curvature.layout.treedef
        costs = curvature.coupled_costs(jax.tree.unflatten(tree, targets), jax.tree.unflatten(tree, at)) - ridge
        scores[group.name] = jnp.where(jnp.isfinite(costs), costs, jnp.nan)
    return scores


def _places(pair: tuple[LeafChannels, LeafChannels] | None, group: ChannelGroup) -> tuple[np.ndarray, np.ndarray]:
    """The weights of each channel in a leaf, `[n, q]`, and which of them read it."""
    if pair is None:
        return np.zeros((group.size, 0), np.int32), np.zeros((group.size, 0), bool)
    whole, read = pair
    at = members(whole, group)
    return at, among(at, members(read, group), int(np.prod(whole.shape)))


@checked
def compensate_channels(
    groups: ChannelGroups, params: Params, kept: Kept, curvature: Curvature, *, gradient: Params | None = None
) -> Updates:
    """Update that removes channels and moves all other weights by the curvature, all channels at once.

    Args:
        groups: From `channel_groups`.
        params: The parameters that the curvature was made for.
        kept: Which channels stay.
        curvature: Stands for `H`, as in `obs_channel_scores`; any will do.
        gradient: Mean gradient `ḡ` for a network that is not at a minimum.

    Returns:
        Updates `δ` for `optax.apply_updates`: exactly `−w` on all weights of removed channels, also in leaves that
        the curvature holds fixed; what a plan of the same `kept` leaves of the result is the smaller network.

    Raises:
        ValueError: As `ChannelGroups.kept_units` and `woodjax.compensate`; a group whose readers are not among
            `params`.

    Cost:
        `curvature.compensate`.

    References:
        As `obs_channel_scores`.

    Example:
        >>> import jax.numpy as jnp, numpy as np, optax, woodjax as wj
        >>> params = {"a": jnp.ones((1, 2)), "b": jnp.array([[1.0], [2.0]])}
        >>> groups = wj.channel_groups(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 1)))
        >>> rows = {"a": jnp.zeros((1, 1, 2)), "b": jnp.ones((1, 2, 1))}  # both hidden units are alike
        >>> fisher = wj.low_rank_fisher(rows, damping=1e-3)
        >>> updates = wj.compensate_channels(groups, params, {"a": np.array([False, True])}, fisher)
        >>> optax.apply_updates(params, updates)["b"].round(2).tolist()
        [[0.0], [3.0]]
    """
    masks = make_plan(groups, kept).masks(params)
    reads = reading_places(groups)
    check_reads(reads, params)
    removed = ~groups.kept_units(kept)
    leaves = [
        jnp.asarray(w) if leaf is None else jnp.where(where_removed(leaf, removed), w, 0)
        for leaf, _, w in match(reads.leaves, params)
    ]
    leaving = jax.tree.unflatten(jax.tree.structure(params), leaves)
    steps = compensate(leaving, masks, curvature, gradient=gradient)
    return jax.tree.map(_move, params, masks, steps)


def _move(w: Float[Array, "..."], mask: Array, step: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.where(mask, step, -jnp.asarray(w))
