"""Group Optimal Brain Surgeon: which groups of weights to prune, by what it costs to lose them together.

`½ t_Qᵀ([H⁻¹]_QQ)⁻¹t_Q` with `t = w`, or `w − H⁻¹ḡ` with a first-order term: the loss increase of removing the group
`Q` after all other weights have moved to make up for it. Patterns: `woodjax.patterns`.
"""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from woodjax import linalg
from woodjax.curvature import Curvature, GroupCurvature
from woodjax.door import checked
from woodjax.masks import make_masks, protect_highest
from woodjax.patterns import NM, Pattern
from woodjax.placement import on_any_axes
from woodjax.ranking import Cost, fewest_that_cost, ranked_leaves
from woodjax.sparsities import Sparsity, check_sparsity, prune_count, sparsity_groups
from woodjax.tree import check_bool, check_like, path_name
from woodjax.typing import Groups, Masks, Params, Scores

GroupScope = Literal["global", "leaf"]
SUBSET_BYTES = 2**26  # of workspace for the subsets of as many groups as are compared at once


@checked
@on_any_axes
def group_scores(
    params: Params,
    curvature: Curvature,
    pattern: Pattern,
    *,
    gradient: Params | None = None,
    batch_axes: int = 0,
) -> Scores:
    """Exact joint cost of every group: the loss increase of removing it, the others moved.

    Args:
        params: A params-tree of floating leaves; zero where weights are pruned already.
        curvature: Stands for `H`: a diagonal, block or row Fisher, or a low-rank Fisher of the whole network.
            Correlations that it does not hold, between blocks for example, are zero.
        pattern: Which weights go together. For `NM(n, m)` the score of a group is that of the `m − n` weights
            that cost least together.
        gradient: Mean gradient `ḡ` for a network that is not at a minimum; the change common to all groups,
            `−½ ḡᵀH⁻¹ḡ`, is left out.
        batch_axes: Leading axes that stack layers; no group straddles two layers.

    Returns:
        Scores `[*batch, groups]` for each prunable leaf, in units of the loss and not divided by the number of
        weights; `[0]` for the others, which have no groups. NaN where a cost cannot be computed.

    Raises:
        ValueError: A curvature that does not answer for groups; a prunable leaf that the pattern does not
            divide; trees that differ.

    Cost:
        `curvature.group_costs`: for a low-rank Fisher about `1.25m²d + 2mdq` flops and a bounded workspace. N:M
        holds `[H⁻¹]_QQ` of all groups, `m` floats a weight, and compares all subsets of a group up to 4:8;
        larger groups go greedily.

    References:
        Kurtić et al., oBERT, 2022 (arXiv 2203.07259), section 3.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> fisher = wj.block_fisher({"w": jnp.array([[[1.0], [1.0]]])}, damping=1.0)  # H = [[2, 1], [1, 2]]
        >>> scores = wj.group_scores({"w": jnp.array([[1.0], [2.0]])}, fisher, wj.Block(2))
        >>> round(float(scores["w"][0]), 3)  # ½ · [1, 2] H [1, 2]
        7.0
    """
    asked = _asked(curvature)
    target = _target(params, asked, gradient)
    groups = _groups(params, asked, pattern, batch_axes)
    if isinstance(pattern, NM):
        _, tree = _subsets(target, asked, groups, pattern, None)
    else:
        tree = asked.group_costs(target, groups)
    return jax.tree.map(lambda cost, w: _shaped(cost, jnp.shape(w)[:batch_axes]), tree, params)


@checked
@on_any_axes
def pattern_masks(
    params: Params,
    curvature: Curvature,
    pattern: Pattern,
    sparsity: Sparsity | None = None,
    *,
    scope: GroupScope = "global",
    previous: Masks | None = None,
    gradient: Params | None = None,
    floor: float = 0.0,
    batch_axes: int = 0,
) -> Masks:
    """Masks that follow a pattern, groups chosen by their exact joint cost.

    Args:
        params: A params-tree of floating leaves; zero where weights are pruned already.
        curvature: As in `group_scores`.
        pattern: Which weights go together.
        sparsity: Fraction of the prunable weights to prune, as in `make_masks`; None for `NM`, which fixes it.
            Where the groups that are ranked together are of one size, exactly `round(s · groups)` groups go,
            lowest cost first. Where sizes differ (rows and filters, scope `"global"`) groups are ranked by cost
            per weight, and as few go as hold `round(s · weights)` weights or more: less than one group too much.
        scope: `"global"` (one ranking for all leaves, or for the leaves of each pattern of a mapping) or `"leaf"`.
        previous: Masks of an earlier step: what they pruned stays pruned. A group counts as pruned when none of
            its weights is left. In an N:M group they are the first to go.
        gradient: As in `group_scores`.
        floor: Every leaf keeps at least the `ceil(floor · groups)` highest groups; not for `NM`.
        batch_axes: As in `group_scores`.

    Returns:
        A params-tree of bool, True = survives, True on leaves that are not prunable.

    Raises:
        ValueError: As `group_scores` and `make_masks`; a sparsity with `NM`, or none without.

    Cost:
        That of `group_scores` and of `make_masks` over the groups.

    References:
        Kurtić et al., oBERT, 2022 (arXiv 2203.07259), section 3; Frantar & Alistarh, OBC, 2022 (arXiv 2208.11580),
        for N:M.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> params = {"w": jnp.array([[1.0], [3.0], [2.0], [4.0]])}
        >>> fisher = wj.diagonal_fisher({"w": jnp.ones((1, 4, 1))})
        >>> wj.pattern_masks(params, fisher, wj.NM(2, 4))["w"].ravel().tolist()
        [False, True, False, True]
        >>> wj.pattern_masks(params, fisher, wj.Block(2), 0.5)["w"].ravel().tolist()
        [False, False, True, True]
    """
    if previous is not None:
        check_like(previous, params, "previous")
        check_bool(previous, "previous")
    if scope not in ("global", "leaf"):
        raise ValueError(f"scope is {scope!r}: choose 'global' or 'leaf', or pass a mapping by leaf as sparsity.")
    asked = _asked(curvature)
    groups = _groups(params, asked, pattern, batch_axes)
    if isinstance(pattern, NM):
        if sparsity is not None or floor:
            raise ValueError(f"sparsity is {sparsity}, floor {floor}: {pattern} fixes how many go, leave both out.")
        chosen, costs = _subsets(_target(params, asked, gradient), asked, groups, pattern, previous)
        ranked_leaves(costs, None)  # raises where there are NaN
    else:
        if sparsity is None:
            raise ValueError(f"sparsity is None: {pattern} needs the fraction to prune, between 0 and 1.")
        check_sparsity(sparsity)
        scores = group_scores(params, asked, pattern, gradient=gradient, batch_axes=batch_axes)
        left = None if previous is None else jax.tree.map(_any_left, previous, groups, scores)
        if scope == "leaf" or _one_size(groups, sparsity, [spec.path for spec in asked.layout.leaves]):
            chosen = make_masks(scores, sparsity, scope=scope, previous=left, batch_axes=batch_axes, floor=floor)
        else:
            chosen = _per_weight(scores, groups, sparsity, left, floor, batch_axes)
    masks = _expand(chosen, groups, tuple(spec.shape for spec in asked.layout.leaves))
    return masks if previous is None else jax.tree.map(jnp.logical_and, masks, previous)


@checked
@on_any_axes
def expand_group_masks(kept: Masks, params: Params, pattern: Pattern, *, batch_axes: int = 0) -> Masks:
    """Full-shape masks from masks over groups, for example from `budget_masks` of `group_scores`.

    Args:
        kept: Bool `[*batch, groups]` for each leaf, `[0]` on leaves without groups, as `group_scores` shapes them.
        params: A params-tree; shapes are enough.
        pattern: Which weights go together.
        batch_axes: Leading axes that stack layers.

    Returns:
        A params-tree of bool, True = survives, True on leaves without groups.

    Raises:
        ValueError: Another tree structure; masks that are not bool; a leaf with another number of groups.

    Cost:
        One pass over the weights.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> kept = {"w": jnp.array([True, False])}
        >>> wj.expand_group_masks(kept, {"w": jnp.ones((2, 3))}, wj.Rows())["w"].tolist()
        [[True, True, True], [False, False, False]]
    """
    if jax.tree.structure(kept) != jax.tree.structure(params):
        raise ValueError("kept has another tree structure than params: pass masks made from group_scores.")
    check_bool(kept, "kept")
    groups = []
    for (path, leaf), mask in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(kept), strict=True):
        found = _leaf_groups(path_name(path), jnp.shape(leaf), pattern, batch_axes, selected=mask.size > 0)
        if mask.size != len(found):
            raise ValueError(
                f"kept: leaf '{path_name(path)}' has {mask.size} groups, expected {len(found)} of {pattern}."
            )
        groups.append(found)
    shapes = tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(params))
    return _expand(kept, jax.tree.unflatten(jax.tree.structure(params), groups), shapes)


def _groups(params: Params, curvature: GroupCurvature, pattern: Pattern, batch_axes: int) -> Groups:
    layout = curvature.layout
    shapes = [jax.ShapeDtypeStruct(spec.shape, jnp.float32) for spec in layout.leaves]
    check_like(params, jax.tree.unflatten(layout.treedef, shapes), "params")
    found = [_leaf_groups(s.path, s.shape, pattern, batch_axes, selected=s.selected) for s in layout.leaves]
    return jax.tree.unflatten(layout.treedef, found)


def _leaf_groups(
    name: str, shape: tuple[int, ...], pattern: Pattern, batch_axes: int, *, selected: bool
) -> Int[np.ndarray, "groups size"]:
    if not selected:
        return np.zeros((0, 0), np.int32)
    try:
        layer = pattern.indices(shape[batch_axes:])
    except ValueError as error:
        raise ValueError(f"Leaf '{name}': {error}") from None
    firsts = np.arange(math.prod(shape[:batch_axes]), dtype=np.int32) * layer.size
    return (firsts[:, None, None] + layer).reshape(-1, layer.shape[1])


def _asked(curvature: Curvature) -> GroupCurvature:
    if not isinstance(curvature, GroupCurvature):
        raise ValueError(
            f"{type(curvature).__name__} does not answer for groups of weights: take low_rank_fisher of the whole "
            "network, block_fisher, row_fisher or diagonal_fisher."
        )
    return curvature


def _target(params: Params, curvature: Curvature, gradient: Params | None) -> Params:
    if gradient is None:
        return params
    check_like(gradient, params, "gradient")
    return jax.tree.map(jnp.subtract, params, curvature.solve(gradient))


def _subsets(
    target: Params, curvature: GroupCurvature, groups: Groups, pattern: NM, previous: Masks | None
) -> tuple[Masks, Scores]:
    """Which weights of every group stay, `[n, m]` for each leaf, and what the others cost together, `[n]`."""
    every = jax.tree.map(lambda w: jnp.ones(jnp.shape(w), bool), target) if previous is None else previous
    found = _cheapest(curvature.group_inverse(groups), target, every, groups, pattern)
    return tuple(jax.tree.unflatten(curvature.layout.treedef, part) for part in zip(*found, strict=True))


@partial(jax.jit, static_argnames="pattern")
def _cheapest(
    inverses: Params, target: Params, previous: Masks, groups: Groups, pattern: NM
) -> list[tuple[Bool[Array, "n m"], Float[Array, " n"]]]:
    count = pattern.m - pattern.n
    subsets = math.comb(pattern.m, count)
    numbers = pattern.m**2 if subsets > linalg.MAX_SUBSETS else subsets * count * count
    at_once = max(1, SUBSET_BYTES // (12 * numbers))
    one = partial(linalg.cheapest_subset, count=count)
    leaves, indices = jax.tree.leaves(inverses), jax.tree.leaves(groups)
    held = [leaf for leaf, at in enumerate(indices) if at.size]  # the groups of all leaves together
    numbers_of = [(jax.tree.leaves(target)[leaf], jax.tree.leaves(previous)[leaf], indices[leaf]) for leaf in held]
    operands = (
        jnp.concatenate([leaves[leaf] for leaf in held]),
        jnp.concatenate([w.reshape(-1)[at] for w, _, at in numbers_of]).astype(leaves[held[0]].dtype),
        jnp.concatenate([~mask.reshape(-1)[at] for _, mask, at in numbers_of]),
    )
    if len(operands[0]) <= at_once:
        pruned, costs = jax.vmap(one)(*operands)
    else:
        pruned, costs = lax.map(lambda group: one(*group), operands, batch_size=at_once)
    ends = np.cumsum([len(indices[leaf]) for leaf in held])[:-1]
    parts = dict(zip(held, zip(jnp.split(~pruned, ends), jnp.split(costs, ends), strict=True), strict=True))
    nothing = jnp.ones((0, 0), bool), jnp.zeros(0, costs.dtype)
    return [parts.get(leaf, nothing) for leaf in range(len(indices))]


def _one_size(groups: Groups, sparsity: Sparsity, names: list[str]) -> bool:
    sizes = [at.shape[1] for at in jax.tree.leaves(groups)]
    together = sparsity_groups(sparsity, names)
    return all(len({sizes[i] for i in group.members} - {0}) <= 1 for group in together)


def _per_weight(
    scores: Scores, groups: Groups, sparsity: Sparsity, left: Masks | None, floor: float, batch_axes: int
) -> Masks:
    """Prune the groups that cost least per weight, until enough weights are gone."""
    sizes = [max(at.shape[1], 1) for at in jax.tree.leaves(groups)]
    names, leaves = ranked_leaves(scores, left)
    rows = [
        (leaf / size).reshape(math.prod(leaf.shape[:batch_axes]), math.prod(leaf.shape[batch_axes:]))
        for leaf, size in zip(leaves, sizes, strict=True)
    ]
    counted = [jnp.sum(~jnp.isposinf(row), dtype=jnp.int32) * size for row, size in zip(rows, sizes, strict=True)]
    _, rows = protect_highest(names, rows, floor)
    pruned: dict[int, Bool[Array, "..."]] = {}
    for group in sparsity_groups(sparsity, names):
        members = group.members
        amount = prune_count(group.sparsity, sum((counted[i] for i in members), start=jnp.zeros((), jnp.int32)))
        costs = tuple(sizes[i] for i in members)
        marked = fewest_that_cost([rows[i].reshape(-1) for i in members], Cost.of(amount), costs)
        held = sum(jnp.sum(mark) * cost for mark, cost in zip(marked, costs, strict=True))
        if not isinstance(held, jax.core.Tracer) and held < amount:
            raise ValueError(
                f"floor is {floor}: it leaves {int(held)} weights to prune where the sparsity asks for {int(amount)}. "
                "Lower the floor or the sparsity."
            )
        pruned |= {i: mark.reshape(leaves[i].shape) for i, mark in zip(members, marked, strict=True)}
    masks = jax.tree.unflatten(jax.tree.structure(scores), [~pruned[i] for i in range(len(leaves))])
    return masks if left is None else jax.tree.map(jnp.logical_and, masks, left)


def _any_left(previous: Bool[Array, "..."], groups: Int[np.ndarray, "n q"], scores: Float[Array, "..."]) -> Array:
    return jnp.any(jnp.reshape(previous, -1)[groups], axis=1).reshape(scores.shape)


@partial(jax.jit, static_argnames="shapes")
def _expand(kept: Masks, groups: Groups, shapes: tuple[tuple[int, ...], ...]) -> Masks:
    """From one entry for each group, or each weight of each group, to full-shape masks."""

    def leaf(mask: Bool[Array, "..."], at: Int[Array, "n q"], shape: tuple[int, ...]) -> Bool[Array, "..."]:
        each = jnp.broadcast_to(mask if mask.shape == at.shape else mask.reshape(-1, 1), at.shape)
        return jnp.ones(math.prod(shape), bool).at[at].set(each, unique_indices=True).reshape(shape)

    each = zip(jax.tree.leaves(kept), jax.tree.leaves(groups), shapes, strict=True)
    return jax.tree.unflatten(jax.tree.structure(kept), [leaf(*operands) for operands in each])


def _shaped(costs: Float[Array, " n"], batch: tuple[int, ...]) -> Float[Array, "..."]:
    costs = jnp.where(jnp.isfinite(costs), costs, jnp.nan)  # +inf means "never prune"
    return costs.reshape(*batch, -1) if costs.size else costs
