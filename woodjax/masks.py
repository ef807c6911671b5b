"""Masks: which weights survive, from scores and a sparsity.

Exactly `round(s · n)` of `n` weights go, halves to even, ties in the order of their index. How they are
found without a sort: `woodjax.ranking`.
"""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from woodjax.ranking import erdos_renyi_counts, is_broken, lowest, ranked_leaves
from woodjax.tree import check_like
from woodjax.typing import Masks, Scores

Scope = Literal["global", "leaf", "erdos_renyi"]

CEIL_SLACK = 1e-3  # of a weight: a floor of 0.1 keeps 1 of 10 weights although 0.1 is a bit more than a tenth


class ExactSparsity(NamedTuple):
    """A sparsity in a compiled program without the rounding of a float32. Made by `exact_sparsity`."""

    head: Int[Array, ""] | int  # the nearest multiple of 2⁻¹², times 2¹²
    tail: Float[Array, ""] | float  # the rest, times 2¹²

    @property
    def value(self) -> Float[Array, ""]:
        """As one float."""
        return (jnp.asarray(self.head, jnp.float32) + self.tail) / 4096


Fraction: TypeAlias = float | Float[Array, ""] | ExactSparsity
Sparsity: TypeAlias = Fraction | Mapping[str, Fraction]


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
    names, leaves = ranked_leaves(scores, previous)
    rows = [leaf.reshape(math.prod(leaf.shape[:batch_axes]), math.prod(leaf.shape[batch_axes:])) for leaf in leaves]
    sizes = [_count(row) for row in rows]
    least, rows = protect_highest(names, rows, floor)
    if scope == "erdos_renyi":
        if isinstance(sparsity, Mapping):
            raise ValueError("sparsity is a mapping, which says what leaves get: pass scope='leaf' or 'global'.")
        total = prune_count(sparsity, _total(sizes))
        counts = erdos_renyi_counts(total, sizes, least, tuple(leaf.shape[batch_axes:] for leaf in leaves))
        pruned, wanted = lowest(rows, counts), total
    else:
        groups = sparsity_groups(sparsity, names)
        if scope == "global":
            merged = [_merge([rows[i] for i in group.members]) for group in groups]
            counts = [prune_count(group.sparsity, _total([sizes[i] for i in group.members])[None]) for group in groups]
            marked = lowest(merged, counts)
            pruned = _split(marked, [group.members for group in groups], rows)
        else:
            share = {i: group.sparsity for group in groups for i in group.members}
            counts = [prune_count(share[i], n) for i, n in enumerate(sizes)]
            pruned = lowest(rows, counts)
        wanted = _total(counts)
    if floor > 0:
        _check_met(_total(pruned), wanted, floor)
    kept = [~p.reshape(leaf.shape) for p, leaf in zip(pruned, leaves, strict=True)]
    masks = jax.tree.unflatten(jax.tree.structure(scores), kept)
    return masks if previous is None else jax.tree.map(jnp.logical_and, masks, previous)


def protect_highest(
    names: list[str], rows: list[Float[Array, "r _"]], floor: float
) -> tuple[list[Int[Array, " r"]], list[Float[Array, "r _"]]]:
    """Take the highest scores of every row out of the ranking.

    Args:
        names: Of the rows' leaves.
        rows: Scores; `-inf` on what is pruned already.
        floor: Fraction of the counted weights to protect, in [0, 1].

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
    sizes = [_count(row) for row in rows]
    least = [_ceil_count(floor, size) for size in sizes]
    for name, row, count in zip(names, rows, least, strict=True):
        left = jnp.sum(jnp.isfinite(row), axis=1)
        if not isinstance(left, jax.core.Tracer) and jnp.any(left < count):
            raise ValueError(
                f"floor is {floor}: leaf '{name}' should keep {int(jnp.max(count))} weights, but the previous masks "
                f"left {int(jnp.min(left))} of them. Lower the floor."
            )
    marked = lowest(rows, [size - count for size, count in zip(sizes, least, strict=True)])
    protected = [~low & ~jnp.isneginf(row) for low, row in zip(marked, rows, strict=True)]
    return least, [jnp.where(high, jnp.inf, row) for high, row in zip(protected, rows, strict=True)]


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
    pairs = list(zip(jax.tree.leaves(masks), jax.tree.leaves(scores), strict=True))
    pruned = sum(jnp.sum(~mask) for mask, _ in pairs)
    counted = sum(jnp.sum(~jnp.isposinf(score) | ~mask) for mask, score in pairs)
    return pruned / jnp.maximum(counted, 1)


def prune_count(sparsity: Fraction, size: Int[Array, "..."]) -> Int[Array, "..."]:
    """`round(sparsity · size)`, halves to even, without the rounding error of a float32 product.

    The head of the sparsity, a multiple of 2⁻¹², is multiplied in integers and only the tail in
    floats: exact below 2³¹ weights but for products within float error of a half.

    Args:
        sparsity: A number in [0, 1]; a traced one is clipped, NaN counts as 0; or an exact one.
        size: Number of weights, any shape.

    Returns:
        Integers of the shape of `size`.

    Cost:
        None to speak of.

    Example:
        >>> import woodjax as wj
        >>> int(wj.prune_count(0.9, 32_360))
        29124
    """
    if not isinstance(sparsity, ExactSparsity):
        if not isinstance(sparsity, float | int):
            sparsity = jnp.clip(jnp.nan_to_num(jnp.asarray(sparsity, jnp.float32), nan=0.0), 0, 1)
        head = round(sparsity * 4096)
        sparsity = ExactSparsity(head, sparsity * 4096 - head)
    base, rest = _product(sparsity, size)
    odd = base % 2  # halves to even are those of the sum, not of the rest
    return base - odd + jnp.round(rest + odd).astype(jnp.int32)


def exact_sparsity(sparsity: float) -> ExactSparsity:
    """A sparsity that keeps its value in a compiled program: for tables of them.

    Args:
        sparsity: A number in [0, 1].

    Returns:
        Two numbers; `make_masks` and `prune_count` take them for one.

    Raises:
        ValueError: Outside [0, 1].

    Cost:
        None.
    """
    check_sparsity(sparsity)
    head = round(sparsity * 4096)
    return ExactSparsity(head, sparsity * 4096 - head)


def check_sparsity(sparsity: Sparsity) -> None:
    """Raise unless every sparsity that is known lies in [0, 1].

    Args:
        sparsity: A number, a traced scalar, or a mapping of them.

    Raises:
        ValueError: Outside [0, 1], NaN, or not a scalar.

    Cost:
        None.
    """
    if isinstance(sparsity, Mapping):
        for value in sparsity.values():
            check_sparsity(value)
        return
    if isinstance(sparsity, ExactSparsity):
        return  # was checked when it was made
    if jnp.ndim(sparsity) != 0:
        raise ValueError(f"sparsity has shape {jnp.shape(sparsity)}: pass one number, or a mapping by leaf path.")
    if not isinstance(sparsity, jax.core.Tracer) and not 0 <= float(sparsity) <= 1:
        raise ValueError(f"sparsity is {float(sparsity)}: it is the fraction to prune, between 0 and 1.")


class Group(NamedTuple):
    """Leaves that share a sparsity."""

    pattern: str | None  # None: no mapping, or no pattern of it matches
    sparsity: Fraction
    members: list[int]  # numbers of the leaves


def sparsity_groups(sparsity: Sparsity, names: list[str]) -> list[Group]:
    """Sparsities, each with the leaves that it is for: all of them, or those of a pattern.

    Args:
        sparsity: As in `make_masks`.
        names: Paths of the leaves.

    Returns:
        Groups, none of them empty.

    Raises:
        ValueError: A pattern that matches no leaf.
    """
    if not isinstance(sparsity, Mapping):
        return [Group(None, sparsity, list(range(len(names))))]
    for pattern in sparsity:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"sparsity names '{pattern}', which matches no leaf of {names}.")
    members: dict[str | None, list[int]] = {None: []} | {pattern: [] for pattern in sparsity}
    for i, name in enumerate(names):
        matches = [pattern for pattern in sparsity if fnmatchcase(name, pattern)]
        members[matches[-1] if matches else None].append(i)
    return [Group(key, 0.0 if key is None else sparsity[key], group) for key, group in members.items() if group]


def _merge(rows: list[Float[Array, "r _"]]) -> Float[Array, "1 _"]:
    return jnp.concatenate([row.reshape(-1) for row in rows])[None]


def _split(
    merged: list[Bool[Array, "1 _"]], members: list[list[int]], like: list[Float[Array, "r _"]]
) -> list[Bool[Array, "r _"]]:
    parts: dict[int, Bool[Array, "r _"]] = {}
    for row, group in zip(merged, members, strict=True):
        ends = np.cumsum([like[i].size for i in group])[:-1]
        parts |= {i: part.reshape(like[i].shape) for i, part in zip(group, jnp.split(row[0], ends), strict=True)}
    return [parts[i] for i in range(len(like))]


def _total(parts: list[Array]) -> Int[Array, ""]:
    return sum((jnp.sum(part, dtype=jnp.int32) for part in parts), start=jnp.zeros((), jnp.int32))


def _count(row: Float[Array, "r _"]) -> Int[Array, " r"]:
    return jnp.sum(~jnp.isposinf(row), axis=1)


def _ceil_count(floor: float, size: Int[Array, "..."]) -> Int[Array, "..."]:
    base, rest = _product(exact_sparsity(floor), size)
    return jnp.minimum(base + jnp.ceil(rest - CEIL_SLACK).astype(jnp.int32), size)


def _product(sparsity: ExactSparsity, size: Int[Array, "..."]) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
    """`sparsity · size` as an integer and what is left."""
    head, tail = jnp.asarray(sparsity.head, jnp.int32), jnp.asarray(sparsity.tail, jnp.float32)
    size = jnp.asarray(size, jnp.int32)
    low = head * (size % 4096)
    base = head * (size // 4096) + low // 4096
    return base, ((low % 4096).astype(jnp.float32) + tail * size.astype(jnp.float32)) / 4096


def _check_met(pruned: Int[Array, ""], wanted: Int[Array, ""], floor: float) -> None:
    if not isinstance(pruned, jax.core.Tracer) and pruned != wanted:
        raise ValueError(
            f"floor is {floor}: it leaves {int(pruned)} weights to prune where the sparsity asks for {int(wanted)}. "
            "Lower the floor or the sparsity."
        )
