"""Masks: which weights survive, from scores and a sparsity.

Exactly `round(s · n)` of `n` weights go, halves to even, ties in the order of their index. How they are
found without a sort: `woodjax.ranking`.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from woodjax.door import checked, checked_but
from woodjax.mesh_ranking import MeshRanker
from woodjax.placement import Placement, on_any_axes, placement_of
from woodjax.ranking import HERE, Ranker, erdos_renyi_counts, is_broken, ranked_leaves
from woodjax.sparsities import (
    Fraction,
    Group,
    Sparsity,
    ceil_count,
    check_sparsity,
    exact_sparsity,
    prune_count,
    sparsity_groups,
)
from woodjax.tree import check_bool, check_like
from woodjax.typing import Masks, Scores

Scope = Literal["global", "leaf", "erdos_renyi"]


@checked_but("floor")
@on_any_axes
def make_masks(
    scores: Scores,
    sparsity: Sparsity,
    *,
    scope: Scope = "global",
    previous: Masks | None = None,
    batch_axes: int = 0,
    floor: float = 0.0,
) -> Masks:
    """Prune the lowest scores.

    Args:
        scores: A params-tree of floats: low = prune first, `+inf` = never prune, do not count.
        sparsity: Fraction of the counted weights to prune, in [0, 1]; or a mapping from leaf
            path to the sparsity of that leaf. A mapping's keys may be patterns (`"layer*"`), the
            last one that matches holds, and a leaf that none matches stays dense. A traced
            number outside [0, 1] is clipped.
        scope: `"global"` (one threshold over all leaves; with a mapping, over the leaves of each
            pattern), `"leaf"` (the same sparsity in every leaf), or `"erdos_renyi"` (density of a leaf in
            proportion to the sum of its axes over their product, met exactly in total; no mapping).
        previous: Masks of an earlier step: what they pruned stays pruned, and counts.
        batch_axes: Leading axes that stack layers: each layer is a leaf of its own for the
            scopes `"leaf"` and `"erdos_renyi"`, and for the floor.
        floor: Every leaf keeps at least the `ceil(floor · n)` highest of its `n` counted weights, whatever the
            scope, so that no layer collapses; the total is met by the others. Up to rounding: a product
            within 0.001 of an integer is that integer.

    Returns:
        A params-tree of bool, True = survives, True on every weight that scores `+inf`. Under
        `jit`, a leaf with a NaN score keeps its previous mask and is not counted, and where
        sparsity and floor cannot both be met the floor holds and less is pruned.

    Raises:
        ValueError: No scores; sparsity outside [0, 1] or NaN; a NaN or `-inf` score (outside `jit`); a
            mapping with `"erdos_renyi"` or a pattern that matches no leaf; `previous` of another
            shape or not bool; a floor outside [0, 1], or one that does not go with the sparsity or with
            `previous` (outside `jit`).

    Cost:
        33 passes over the scores: `33d` comparisons, about 16 bytes a weight. As much again for a floor.

    References:
        Zhu & Gupta 2017 (arXiv 1710.01878) for magnitude; Evci et al., RigL, 2020
        (arXiv 1911.11134), section 3, for the Erdős–Rényi kernel densities.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> wj.make_masks({"w": jnp.array([3.0, 1.0, 2.0, 4.0])}, 0.5)["w"].tolist()
        [True, False, False, True]
    """
    if scope not in ("global", "leaf", "erdos_renyi"):
        raise ValueError(f"scope is {scope!r}: choose 'global', 'leaf' or 'erdos_renyi'; a mapping goes in sparsity.")
    check_sparsity(sparsity)
    if scope == "erdos_renyi" and isinstance(sparsity, Mapping):
        raise ValueError("sparsity is a mapping, which says what leaves get: pass scope='leaf' or 'global'.")
    placement = placement_of(scores)
    names, leaves = ranked_leaves(scores, previous)
    shapes = tuple(leaf.shape[batch_axes:] for leaf in leaves)
    groups = sparsity_groups(sparsity, names)
    if placement is None:
        marked, missing = mark_lowest(names, leaves, groups, HERE, scope=scope, floor=floor, shapes=shapes)
    else:
        marked, missing = _mark_on_mesh(names, leaves, groups, placement, scope, floor, shapes)
    if floor > 0 and not isinstance(missing, jax.core.Tracer) and missing:
        raise ValueError(
            f"floor is {floor}: it keeps {int(missing)} of the weights that the sparsity asks to prune. "
            "Lower the floor or the sparsity."
        )
    masks = jax.tree.unflatten(jax.tree.structure(scores), [~pruned for pruned in marked])
    return masks if previous is None else jax.tree.map(jnp.logical_and, masks, previous)


def mark_lowest(
    names: list[str],
    leaves: list[Float[Array, "..."]],
    groups: list[Group],
    ranker: Ranker,
    *,
    scope: Scope,
    floor: float,
    shapes: tuple[tuple[int, ...], ...],
) -> tuple[list[Bool[Array, "..."]], Int[Array, ""]]:
    """Which weights go: the body of `make_masks`, wherever the leaves are.

    Args:
        names: Paths of the leaves.
        leaves: Scores as they are ranked, or the shards of them that are here.
        groups: Sparsities, each with its leaves.
        ranker: Counts and ranks, here or over devices.
        scope: As in `make_masks`.
        floor: As in `make_masks`.
        shapes: Of the whole leaves, without batch axes.

    Returns:
        True on what goes, and how many weights less than asked.
    """
    layers = [math.prod(leaf.shape[: leaf.ndim - len(shape)]) for leaf, shape in zip(leaves, shapes, strict=True)]
    rows = [leaf.reshape(n, -1) if leaf.size else leaf.reshape(n, 0) for n, leaf in zip(layers, leaves, strict=True)]
    sizes = ranker.count([~jnp.isposinf(row) for row in rows])
    least, rows = protect_highest(names, rows, floor, ranker)
    alone = [[i] for i in range(len(rows))]
    if scope == "erdos_renyi":
        wanted = prune_count(groups[0].sparsity, _total(sizes))
        counts = erdos_renyi_counts(wanted, sizes, least, shapes)
        marked = ranker.lowest(rows, alone, counts)
    elif scope == "global":
        counts = [prune_count(group.sparsity, _total([sizes[i] for i in group.members])[None]) for group in groups]
        flat = [row.reshape(1, -1) for row in rows]  # layers of a leaf are ranked together
        marked, wanted = ranker.lowest(flat, [group.members for group in groups], counts), _total(counts)
    else:
        share = {i: group.sparsity for group in groups for i in group.members}
        counts = [prune_count(share[i], n) for i, n in enumerate(sizes)]
        marked, wanted = ranker.lowest(rows, alone, counts), _total(counts)
    missing = wanted - _total(ranker.count(marked)) if floor > 0 else jnp.zeros((), jnp.int32)
    return [mark.reshape(leaf.shape) for mark, leaf in zip(marked, leaves, strict=True)], missing


def _mark_on_mesh(
    names: list[str],
    leaves: list[Float[Array, "..."]],
    groups: list[Group],
    placement: Placement,
    scope: Scope,
    floor: float,
    shapes: tuple[tuple[int, ...], ...],
) -> tuple[list[Bool[Array, "..."]], Int[Array, ""]]:
    ranker = MeshRanker(placement, tuple(leaf.shape for leaf in leaves), shapes)
    ranker.check(names, together=scope != "leaf")
    # A number that is known stays exact in the compiled program.
    exact = [exact_sparsity(x) if isinstance(x, float | int) else x for x in (group.sparsity for group in groups)]
    members = tuple(tuple(group.members) for group in groups)
    return _mark_on_devices(leaves, exact, tuple(names), members, ranker, scope, floor, shapes)


@partial(jax.jit, static_argnums=(2, 3, 4, 5, 6, 7))
def _mark_on_devices(
    leaves: list[Float[Array, "..."]],
    sparsities: list[Fraction],
    names: tuple[str, ...],
    members: tuple[tuple[int, ...], ...],
    ranker: MeshRanker,
    scope: Scope,
    floor: float,
    shapes: tuple[tuple[int, ...], ...],
) -> tuple[list[Bool[Array, "..."]], Int[Array, ""]]:
    def mark(leaves: list[Array], sparsities: list[Fraction]) -> tuple[list[Array], Array]:
        groups = [Group(None, x, list(some)) for x, some in zip(sparsities, members, strict=True)]
        return mark_lowest(list(names), leaves, groups, ranker, scope=scope, floor=floor, shapes=shapes)

    return ranker.run(mark)(leaves, sparsities)


def protect_highest(
    names: list[str], rows: list[Float[Array, "r _"]], floor: float, ranker: Ranker = HERE
) -> tuple[list[Int[Array, " r"]], list[Float[Array, "r _"]]]:
    """Take the highest scores of every row out of the ranking.

    Args:
        names: Of the rows' leaves.
        rows: Scores; `-inf` on what is pruned already.
        floor: Fraction of the counted weights to protect, in [0, 1].
        ranker: Counts and ranks, here or over devices.

    Returns:
        How many of each row are protected, and the scores, `+inf` where they are.

    Raises:
        ValueError: A floor outside [0, 1], or one above what was kept before (outside `jit`).

    Cost:
        33 passes; none without a floor.
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"floor is {floor}: it is the fraction of every leaf that stays, between 0 and 1.")
    if floor == 0:
        return [jnp.zeros(row.shape[0], jnp.int32) for row in rows], rows
    sizes = ranker.count([~jnp.isposinf(row) for row in rows])
    least = [ceil_count(floor, size) for size in sizes]
    remaining = ranker.count([jnp.isfinite(row) for row in rows])
    for name, left, count in zip(names, remaining, least, strict=True):
        if not isinstance(left, jax.core.Tracer) and jnp.any(left < count):
            raise ValueError(
                f"floor is {floor}: leaf '{name}' should keep {int(jnp.max(count))} weights, but the previous masks "
                f"left {int(jnp.min(left))} of them. Lower the floor."
            )
    alone = [[i] for i in range(len(rows))]
    marked = ranker.lowest(rows, alone, [size - count for size, count in zip(sizes, least, strict=True)])
    protected = [~low & ~jnp.isneginf(row) for low, row in zip(marked, rows, strict=True)]
    return least, [jnp.where(high, jnp.inf, row) for high, row in zip(protected, rows, strict=True)]


@checked
def nonfinite_scores(scores: Scores) -> Int[Array, ""]:
    """Number of leaves with a NaN or `-inf` score: those keep their previous mask under `jit`.

    Args:
        scores: A params-tree of floats.

    Returns:
        An integer scalar.

    Cost:
        One pass over the scores.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> int(wj.nonfinite_scores({"a": jnp.array([jnp.nan]), "b": jnp.array([1.0])}))
        1
    """
    return sum((is_broken(leaf).astype(jnp.int32) for leaf in jax.tree.leaves(scores)), start=jnp.int32(0))


@checked
@on_any_axes
def mask_sparsity(masks: Masks, scores: Scores) -> Float[Array, ""]:
    """Pruned fraction of the weights that the scores count.

    Args:
        masks: A params-tree of bool.
        scores: The scores that they were made from: `+inf` is not counted.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: The two trees differ.

    Cost:
        One pass.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> scores = {"w": jnp.array([1.0, 2.0, jnp.inf])}
        >>> float(wj.mask_sparsity(wj.make_masks(scores, 0.5), scores))
        0.5
    """
    check_like(masks, scores, "masks")
    check_bool(masks, "masks")
    pairs = list(zip(jax.tree.leaves(masks), jax.tree.leaves(scores), strict=True))
    # Of a leaf in integers, together in floats: there may be more than 2³¹.
    pruned = sum(jnp.sum(~mask).astype(jnp.float32) for mask, _ in pairs)
    counted = sum(jnp.sum(~jnp.isposinf(score) | ~mask).astype(jnp.float32) for mask, score in pairs)
    return pruned / jnp.maximum(counted, 1)


def _total(parts: list[Array]) -> Int[Array, ""]:
    return sum((jnp.sum(part, dtype=jnp.int32) for part in parts), start=jnp.zeros((), jnp.int32))
