"""Which entries are the lowest: by bisection over the bits of a float, with counts alone.

As many passes over the scores as a float has bits, no sort, and only counts would travel between devices. Ties go
in the order of their index. `+inf` is never among the lowest.
"""

import math
from functools import partial
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from woodjax.tree import check_bool, check_like, path_name
from woodjax.typing import Masks, Scores

LARGEST_COST = 2**40  # of all weights together: float32 is then within 2³⁰ of the truth


def ranked_leaves(scores: Scores, previous: Masks | None) -> tuple[list[str], list[Float[Array, "..."]]]:
    """Leaves of a tree of scores as they are ranked: what was pruned before is `-inf`, a broken leaf `+inf`.

    Args:
        scores: A params-tree of floats.
        previous: Masks of an earlier step, or None.

    Returns:
        Paths, and leaves of at least float32.

    Raises:
        ValueError: No leaves; scores that are not floats; a NaN or `-inf` that is not traced; `previous` of
            another shape or not bool.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(scores)
    names = [path_name(path) for path, _ in paths]
    if not names:
        raise ValueError("scores have no leaves: pass a params-tree of floats.")
    if previous is not None:
        check_like(previous, scores, "previous")
        check_bool(previous, "previous")
    leaves = [jnp.asarray(leaf) for _, leaf in paths]
    for name, leaf in zip(names, leaves, strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"Scores of leaf '{name}' are {leaf.dtype}: scores are floats.")
    ranked, broken = _ranked(leaves, None if previous is None else jax.tree.leaves(previous))
    if not isinstance(broken, jax.core.Tracer) and np.any(broken):
        name, leaf = next((name, x) for name, x, bad in zip(names, leaves, np.asarray(broken), strict=True) if bad)
        raise ValueError(
            f"Scores of leaf '{name}' hold {int(jnp.sum(jnp.isnan(leaf) | jnp.isneginf(leaf)))} NaN or -inf of "
            f"{leaf.size}: look for NaN in the batch, the parameters and the gradients, or raise the damping."
        )
    return names, ranked


def is_broken(leaf: Float[Array, "..."]) -> Bool[Array, ""]:
    """Does a leaf of scores hold NaN or `-inf`, which no criterion means?"""
    return jnp.any(jnp.isnan(leaf) | jnp.isneginf(leaf))


@jax.jit
def lowest(rows: list[Float[Array, "r _"]], counts: list[Int[Array, " r"]]) -> list[Bool[Array, "r _"]]:
    """Mark exactly `counts[i]` smallest entries in each row, ties by index.

    Args:
        rows: Scores, ranked row by row.
        counts: How many to mark, at most as many as are not `+inf`.

    Returns:
        True on the marked.

    Cost:
        33 passes.
    """
    keys = [sortable(row) for row in rows]
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
    for key, threshold, count, row in zip(keys, thresholds, counts, rows, strict=True):
        ties = key == threshold[:, None]
        room = count - count_below(key, threshold)
        low = (key < threshold[:, None]) | (ties & (jnp.cumsum(ties, axis=1) <= room[:, None]))
        marked.append(low & ~jnp.isposinf(row))
    return marked


class Ranker(Protocol):
    """Counts and ranks rows of leaves, wherever they are."""

    def count(self, marks: list[Bool[Array, "r _"]]) -> list[Int[Array, " r"]]:
        """True entries in each row of every leaf."""
        ...

    def lowest(
        self, rows: list[Float[Array, "r _"]], groups: list[list[int]], counts: list[Int[Array, " r"]]
    ) -> list[Bool[Array, "r _"]]:
        """`lowest`, with the leaves of each group ranked together, ties in the order of the leaves and the index."""
        ...


class Here:
    """A `Ranker` of arrays that are on one device."""

    def count(self, marks: list[Bool[Array, "r _"]]) -> list[Int[Array, " r"]]:
        """True entries in each row of every leaf."""
        return [jnp.sum(mark, axis=1, dtype=jnp.int32) for mark in marks]

    def lowest(
        self, rows: list[Float[Array, "r _"]], groups: list[list[int]], counts: list[Int[Array, " r"]]
    ) -> list[Bool[Array, "r _"]]:
        """`lowest`; leaves that are ranked together are put into one array."""
        merged = [jnp.concatenate([rows[i] for i in group], axis=1) for group in groups]
        parts: dict[int, Bool[Array, "r _"]] = {}
        for marked, group in zip(lowest(merged, counts), groups, strict=True):
            ends = np.cumsum([rows[i].shape[1] for i in group])[:-1]
            parts |= dict(zip(group, jnp.split(marked, ends, axis=1), strict=True))
        return [parts[i] for i in range(len(rows))]


HERE = Here()


class Cost(NamedTuple):
    """A sum of integers up to 2⁴⁰ without integers of 64 bits: its value as a float, and its last 32 bits."""

    value: Float[Array, ""] | float
    last_bits: UInt[Array, ""]

    @classmethod
    def of(cls, number: int | Int[Array, ""]) -> Self:
        """Of one integer: any Python one, or an array of 32 bits."""
        if isinstance(number, int):
            return cls(float(number), jnp.asarray(number % 2**32, jnp.uint32))
        return cls(number.astype(jnp.float32), number.astype(jnp.uint32))

    def reaches(self, other: "Cost") -> Bool[Array, ""]:
        """Is it at least the other? Exact up to `LARGEST_COST`."""
        apart = self.value - other.value
        exact = lax.bitcast_convert_type(self.last_bits - other.last_bits, jnp.int32)
        return jnp.where(jnp.abs(apart) < 2**30, exact >= 0, apart > 0)


@partial(jax.jit, static_argnames="costs")
def fewest_that_cost(leaves: list[Float[Array, " _"]], amount: Cost, costs: tuple[int, ...]) -> list[Bool[Array, " _"]]:
    """Mark the lowest entries of all leaves together, as few as cost `amount` or more.

    Args:
        leaves: Scores, ranked together; ties in the order of the leaves and then of the index.
        amount: What the marked must cost; all that are not `+inf` are marked where that is not enough.
        costs: Of one entry of each leaf: integers, not negative; `LARGEST_COST` at most over all entries.

    Returns:
        True on the marked.

    Cost:
        64 passes.
    """
    dtype = jnp.result_type(*leaves)
    starts = np.cumsum([0, *(leaf.size for leaf in leaves)])
    alike = [[i for i, other in enumerate(costs) if other == cost] for cost in dict.fromkeys(costs)]
    ranked = [jnp.concatenate([leaves[i].astype(dtype) for i in members]) for members in alike]
    places = [
        jnp.concatenate([jnp.arange(starts[i], starts[i + 1], dtype=jnp.uint32) for i in members]) for members in alike
    ]
    keys, open_ = [sortable(row) for row in ranked], [~jnp.isposinf(row) for row in ranked]

    def enough(marked: list[Array]) -> Array:
        counts = [jnp.sum(mark & may, dtype=jnp.int32) for mark, may in zip(marked, open_, strict=True)]
        value, last_bits = jnp.zeros(()), jnp.zeros((), jnp.uint32)
        for cost, count in zip(dict.fromkeys(costs), counts, strict=True):
            value += float(cost) * count.astype(jnp.float32)
            last_bits += jnp.asarray(cost % 2**32, jnp.uint32) * count.astype(jnp.uint32)
        return Cost(value, last_bits).reaches(amount)

    def largest(bits: int, dtype: Any, too_few: Any) -> Array:
        def set_bit(i: Array, found: Array) -> Array:
            higher = found | (jnp.ones((), dtype) << (bits - 1 - i).astype(dtype))
            return jnp.where(too_few(higher), higher, found)

        return lax.fori_loop(0, bits, set_bit, jnp.zeros((), dtype))

    def before(threshold: Array, place: Array) -> list[Array]:
        return [(key < threshold) | ((key == threshold) & (at < place)) for key, at in zip(keys, places, strict=True)]

    zero = jnp.zeros((), jnp.uint32)
    key_bits = keys[0].dtype.itemsize * 8
    threshold = largest(key_bits, keys[0].dtype, lambda key: ~enough(before(key, zero)))
    place = largest(31, jnp.uint32, lambda at: ~enough(before(threshold, at)))
    none = enough([jnp.zeros_like(may) for may in open_])
    marked = before(threshold, place + 1)
    found: dict[int, Bool[Array, " _"]] = {}
    for members, mark, may in zip(alike, marked, open_, strict=True):
        ends = np.cumsum([leaves[i].size for i in members])[:-1]
        found |= dict(zip(members, jnp.split(mark & may & ~none, ends), strict=True))
    return [found[i] for i in range(len(leaves))]


@partial(jax.jit, static_argnames="shapes")
def erdos_renyi_counts(
    total: Int[Array, ""],
    sizes: list[Int[Array, " r"]],
    least: list[Int[Array, " r"]],
    shapes: tuple[tuple[int, ...], ...],
) -> list[Int[Array, " r"]]:
    """Split a count over leaves so that density is proportional to `Σ axes / Π axes`, at most 1.

    Args:
        total: Weights to prune.
        sizes: Weights that count, for each layer of each leaf.
        least: Weights that stay whatever their density.
        shapes: Of the leaves, without batch axes.

    Returns:
        How many to prune of each.

    Cost:
        None to speak of.
    """
    size, floor = jnp.concatenate(sizes), jnp.concatenate(least)
    raw = [sum(shape) / max(math.prod(shape), 1) for shape in shapes]
    raw = jnp.repeat(jnp.array(raw, jnp.float32), jnp.array([len(s) for s in sizes]), total_repeat_length=len(size))
    kept = (jnp.sum(size) - total).astype(jnp.float32)

    def share(scale: Array) -> Array:
        return jnp.clip(jnp.minimum(1.0, scale * raw) * size, floor, size)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        enough = jnp.sum(share(middle)) >= kept
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    top = 1 / jnp.min(jnp.where(raw > 0, raw, 1.0))
    _, scale = lax.fori_loop(0, 40, halve, (jnp.zeros(()), top))
    ideal = size - share(scale)
    counts = jnp.floor(ideal).astype(jnp.int32)
    order = jnp.argsort(jnp.argsort(-(ideal - counts), stable=True), stable=True)  # largest remainder first
    counts = jnp.minimum(counts + (order < total - jnp.sum(counts)), size - floor)
    left = total - jnp.sum(counts)  # by float error
    roomiest = jnp.argmax(jnp.where(left > 0, size - floor - counts, counts))
    counts = jnp.clip(counts.at[roomiest].add(left), 0, size - floor)
    return jnp.split(counts, np.cumsum([len(s) for s in sizes])[:-1])


@jax.jit
def _ranked(
    leaves: list[Float[Array, "..."]], previous: list[Bool[Array, "..."]] | None
) -> tuple[list[Float[Array, "..."]], Bool[Array, " leaves"]]:
    # One program: many small ones wait for each other where arrays lie on many devices.
    broken = [is_broken(leaf) for leaf in leaves]
    wide = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in leaves]
    if previous is not None:
        wide = [jnp.where(mask, leaf, -jnp.inf) for leaf, mask in zip(wide, previous, strict=True)]
    held = [jnp.where(bad, jnp.inf, leaf) for leaf, bad in zip(wide, broken, strict=True)]
    return held, jnp.stack(broken)


def sortable(x: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Unsigned integers in the order of the floats; -0 and 0 are one value.

    Args:
        x: Floats of 32 or 64 bits.

    Returns:
        As many bits.
    """
    unsigned = jnp.uint64 if x.dtype.itemsize == 8 else jnp.uint32
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0, x), unsigned)  # x + 0 is simplified away
    sign = jnp.asarray(1, unsigned) << (x.dtype.itemsize * 8 - 1)
    return jnp.where(bits & sign != 0, ~bits, bits | sign)
