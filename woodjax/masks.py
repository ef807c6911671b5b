"""Masks: which weights survive, from scores and a sparsity.

Exactly `round(s · n)` of `n` weights go, halves to even, ties in the order of their index. The
k-th smallest score is found by bisection over the bits of a float: as many passes over the
scores as a float has bits, no sort, and only counts would travel between devices.
"""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from woodjax.tree import check_bool, check_like, path_name
from woodjax.typing import Masks, Scores

Scope = Literal["global", "leaf", "erdos_renyi"]


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
            scopes `"leaf"` and `"erdos_renyi"`.

    Returns:
        A params-tree of bool, True = survives, True on every weight that scores `+inf`. Under
        `jit`, a leaf with a NaN score keeps its previous mask and is not counted.

    Raises:
        ValueError: No scores; sparsity outside [0, 1] or NaN; a NaN or `-inf` score (outside `jit`); a
            mapping with `"erdos_renyi"` or a pattern that matches no leaf; `previous` of another
            shape or not bool.

    Cost:
        33 passes over the scores: `33d` comparisons, about 16 bytes a weight.

    References:
        Zhu & Gupta 2017 (arXiv 1710.01878) for magnitude; Evci et al., RigL, 2020
        (arXiv 1911.11134), section 3, for the Erdős–Rényi kernel densities.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> wj.make_masks({"w": jnp.array([3.0, 1.0, 2.0, 4.0])}, 0.5)["w"].tolist()
        [True, False, False, True]
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(scores)
    names = [path_name(path) for path, _ in paths]
    if scope not in ("global", "leaf", "erdos_renyi"):
        raise ValueError(f"scope is {scope!r}: choose 'global', 'leaf' or 'erdos_renyi'; a mapping goes in sparsity.")
    check_sparsity(sparsity)
    if not names:
        raise ValueError("scores have no leaves: pass a params-tree of floats.")
    if previous is not None:
        check_like(previous, scores, "previous")
        check_bool(previous, "previous")
    before = [None] * len(names) if previous is None else jax.tree.leaves(previous)
    leaves = [_ranked(name, leaf, mask) for name, (_, leaf), mask in zip(names, paths, before, strict=True)]
    if scope == "global":
        pruned = _lowest_of_groups(leaves, sparsity_groups(sparsity, names))
    else:
        rows = [leaf.reshape(math.prod(leaf.shape[:batch_axes]), math.prod(leaf.shape[batch_axes:])) for leaf in leaves]
        sizes = [jnp.sum(~jnp.isposinf(row), axis=1) for row in rows]
        if scope == "erdos_renyi":
            if isinstance(sparsity, Mapping):
                raise ValueError("sparsity is a mapping, which says what leaves get: pass scope='leaf' or 'global'.")
            shapes = tuple(leaf.shape[batch_axes:] for leaf in leaves)
            total = prune_count(sparsity, jnp.sum(jnp.concatenate(sizes)))
            counts = _erdos_renyi_counts(total, sizes, shapes)
        else:
            share = {i: group.sparsity for group in sparsity_groups(sparsity, names) for i in group.members}
            counts = [prune_count(share[i], n) for i, n in enumerate(sizes)]
        pruned = lowest(rows, counts)
    masks = [~p.reshape(leaf.shape) for p, leaf in zip(pruned, leaves, strict=True)]
    if previous is not None:
        masks = [mask & old for mask, old in zip(masks, jax.tree.leaves(previous), strict=True)]
    return jax.tree.unflatten(treedef, masks)


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
    if isinstance(sparsity, ExactSparsity):
        head, tail = sparsity
    else:
        if not isinstance(sparsity, float | int):
            sparsity = jnp.clip(jnp.nan_to_num(jnp.asarray(sparsity, jnp.float32), nan=0.0), 0, 1)
        scaled = sparsity * 4096
        head = round(scaled)
        tail = scaled - head
    head, tail, size = jnp.asarray(head, jnp.int32), jnp.asarray(tail, jnp.float32), jnp.asarray(size, jnp.int32)
    low = head * (size % 4096)
    base = head * (size // 4096) + low // 4096
    rest = ((low % 4096).astype(jnp.float32) + tail * size.astype(jnp.float32)) / 4096
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


def is_broken(leaf: Float[Array, "..."]) -> Bool[Array, ""]:
    """Does a leaf of scores hold NaN or `-inf`, which no criterion means?"""
    return jnp.any(jnp.isnan(leaf) | jnp.isneginf(leaf))


def _ranked(name: str, leaf: Any, previous: Bool[Array, "..."] | None) -> Float[Array, "..."]:
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"Scores of leaf '{name}' are {leaf.dtype}: scores are floats.")
    leaf = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    broken = is_broken(leaf)
    if not isinstance(broken, jax.core.Tracer) and broken:
        bad = int(jnp.sum(jnp.isnan(leaf) | jnp.isneginf(leaf)))
        raise ValueError(
            f"Scores of leaf '{name}' hold {bad} NaN or -inf of {leaf.size}: look for NaN in the batch, "
            "the parameters and the gradients, or raise the damping."
        )
    if previous is not None:
        leaf = jnp.where(previous, leaf, -jnp.inf)
    return jnp.where(broken, jnp.inf, leaf)


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


def _lowest_of_groups(leaves: list[Float[Array, "..."]], groups: list[Group]) -> list[Bool[Array, "..."]]:
    flats = [jnp.concatenate([leaves[i].reshape(-1) for i in group.members])[None] for group in groups]
    counts = [
        prune_count(group.sparsity, jnp.sum(~jnp.isposinf(flat), axis=1))
        for group, flat in zip(groups, flats, strict=True)
    ]
    pruned: dict[int, Bool[Array, "..."]] = {}
    for group, marked in zip(groups, lowest(flats, counts), strict=True):
        ends = np.cumsum([leaves[i].size for i in group.members])[:-1]
        parts = jnp.split(marked[0], ends)
        pruned |= {i: part.reshape(leaves[i].shape) for i, part in zip(group.members, parts, strict=True)}
    return [pruned[i] for i in range(len(leaves))]


@jax.jit
def lowest(rows: list[Float[Array, "r _"]], counts: list[Int[Array, " r"]]) -> list[Bool[Array, "r _"]]:
    """Mark exactly `counts[i]` smallest entries in each row, ties by index.

    Args:
        rows: Floats, all of one dtype; no NaN.
        counts: How many to mark, for each row.

    Returns:
        True on the entries marked.

    Cost:
        33 passes.
    """
    keys = [_sortable(row) for row in rows]
    bits = keys[0].dtype.itemsize * 8
    one = jnp.ones((), keys[0].dtype)

    def count_below(key: Array, threshold: Array) -> Array:
        return jnp.sum(key < threshold[:, None], axis=1, dtype=jnp.int32)

    def set_bit(i: Array, thresholds: list[Array]) -> list[Array]:
        bit = one << (bits - 1 - i).astype(one.dtype)
        return [
            jnp.where(count_below(key, t | bit) < count, t | bit, t)
            for key, t, count in zip(keys, thresholds, counts, strict=True)
        ]

    # After the loop: the largest threshold that fewer than `count` keys lie below, the count-th smallest key.
    thresholds = lax.fori_loop(0, bits, set_bit, [jnp.zeros(key.shape[0], key.dtype) for key in keys])
    marked = []
    for key, threshold, count in zip(keys, thresholds, counts, strict=True):
        ties = key == threshold[:, None]
        room = count - count_below(key, threshold)
        marked.append((key < threshold[:, None]) | (ties & (jnp.cumsum(ties, axis=1) <= room[:, None])))
    return marked


def _sortable(x: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Unsigned integers in the order of the floats; -0 and 0 are one value."""
    unsigned = jnp.uint64 if x.dtype.itemsize == 8 else jnp.uint32
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0, x), unsigned)  # x + 0 is simplified away
    sign = jnp.asarray(1, unsigned) << (x.dtype.itemsize * 8 - 1)
    return jnp.where(bits & sign != 0, ~bits, bits | sign)


@partial(jax.jit, static_argnames="shapes")
def _erdos_renyi_counts(
    total: Int[Array, ""],
    sizes: list[Int[Array, " r"]],
    shapes: tuple[tuple[int, ...], ...],
) -> list[Int[Array, " r"]]:
    """Split a count over leaves so that density is proportional to `Σ axes / Π axes`, at most 1."""
    size = jnp.concatenate(sizes)
    raw = [sum(shape) / max(math.prod(shape), 1) for shape in shapes]
    raw = jnp.repeat(jnp.array(raw, jnp.float32), jnp.array([len(s) for s in sizes]), total_repeat_length=len(size))
    kept = (jnp.sum(size) - total).astype(jnp.float32)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        enough = jnp.sum(jnp.minimum(1.0, middle * raw) * size) >= kept
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    top = 1 / jnp.min(jnp.where(raw > 0, raw, 1.0))
    _, scale = lax.fori_loop(0, 40, halve, (jnp.zeros(()), top))
    ideal = (1 - jnp.minimum(1.0, scale * raw)) * size
    counts = jnp.floor(ideal).astype(jnp.int32)
    order = jnp.argsort(jnp.argsort(-(ideal - counts), stable=True), stable=True)  # largest remainder first
    counts = jnp.minimum(counts + (order < total - jnp.sum(counts)), size)
    largest = jnp.argmax(size)  # takes what float error left over
    counts = counts.at[largest].add(total - jnp.sum(counts))
    return jnp.split(counts, np.cumsum([len(s) for s in sizes])[:-1])
