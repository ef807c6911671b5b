"""Ranking of leaves that are split over devices: the bisection of `ranking`, with counts that are added up.

Nothing but counts travels: an all-reduce of a few integers for each bit of a score, and as many for the places of ties.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt

from woodjax.placement import Placement
from woodjax.ranking import sortable

LARGEST = 2**31  # of counts


@dataclass(frozen=True)
class MeshRanker:
    """A `Ranker` of the shards that a device holds, inside `run`. Static."""

    placement: Placement
    leaves: tuple[tuple[int, ...], ...]  # shapes of the whole leaves
    shapes: tuple[tuple[int, ...], ...]  # without batch axes

    def check(self, names: list[str], *, together: bool) -> None:
        """Raise unless these leaves can be ranked where they are.

        Args:
            names: Paths of the leaves.
            together: Are they ranked together?

        Raises:
            ValueError: Stacked layers that are split over devices; more weights than counts can hold.
        """
        for number, (name, leaf, shape) in enumerate(zip(names, self.leaves, self.shapes, strict=True)):
            if any(self.placement.leaves[number].dims[: len(leaf) - len(shape)]):
                raise ValueError(
                    f"Leaf '{name}' stacks layers along an axis that is split over devices: leave that axis whole, or "
                    "rank without batch_axes."
                )
            if math.prod(leaf) >= LARGEST:
                raise ValueError(f"Leaf '{name}' has {math.prod(leaf)} weights: at most 2³¹ can be ranked together.")
        total = sum(math.prod(leaf) for leaf in self.leaves)
        if together and total >= LARGEST:
            raise ValueError(f"{total} weights: at most 2³¹ can be ranked together; pass scope='leaf'.")

    def run(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(leaves, *others)` on the shards of every device; it returns leaves and numbers."""
        specs = [leaf.spec for leaf in self.placement.leaves]
        return jax.shard_map(
            function,
            mesh=self.placement.mesh,
            in_specs=(specs, PartitionSpec()),
            out_specs=(specs, PartitionSpec()),
            check_vma=False,
        )

    def count(self, marks: list[Bool[Array, "r _"]]) -> list[Int[Array, " r"]]:
        """True entries in each row of every leaf, over all its shards: an all-reduce for each way to be split."""
        here = [jnp.sum(mark, axis=1, dtype=jnp.int32) for mark in marks]
        ways: dict[tuple[str, ...], list[int]] = {}
        for number, place in enumerate(self.placement.leaves):
            if place.axes:
                ways.setdefault(place.axes, []).append(number)
        for axes, members in ways.items():
            ends = [sum(here[i].size for i in members[: n + 1]) for n in range(len(members) - 1)]
            sums = lax.psum(jnp.concatenate([here[i] for i in members]), axes)
            for i, part in zip(members, jnp.split(sums, ends), strict=True):
                here[i] = part
        return here

    def lowest(
        self, rows: list[Float[Array, "r _"]], groups: list[list[int]], counts: list[Int[Array, " r"]]
    ) -> list[Bool[Array, "r _"]]:
        """The lowest of each group, ties in the order of the leaves and of the index in the whole leaf."""
        dtype = jnp.result_type(*rows)
        keys = [sortable(row.astype(dtype)) for row in rows]
        group_of = {i: number for number, group in enumerate(groups) for i in group}

        def totals(marks: list[Array]) -> list[Array]:
            found = self.count(marks)
            return [sum((found[i] for i in group[1:]), start=found[group[0]]) for group in groups]

        def below(thresholds: list[Array]) -> list[Array]:
            return [key < thresholds[group_of[i]][:, None] for i, key in enumerate(keys)]

        bits, zeros = keys[0].dtype.itemsize * 8, [jnp.zeros(count.shape, keys[0].dtype) for count in counts]

        def too_few(found: list[Array]) -> list[Array]:
            return [n < count for n, count in zip(totals(below(found)), counts, strict=True)]

        thresholds = _largest(bits, zeros, too_few)
        less = below(thresholds)
        ties = [key == thresholds[group_of[i]][:, None] for i, key in enumerate(keys)]
        rooms = self._rooms(groups, [count - n for count, n in zip(counts, totals(less), strict=True)], ties)
        places = [self._places(i).reshape(row.shape) for i, row in enumerate(rows)]

        def first(ends: list[Array]) -> list[Array]:
            return [tie & (place < end[:, None]) for tie, place, end in zip(ties, places, ends, strict=True)]

        none = [jnp.zeros(room.shape, jnp.uint32) for room in rooms]
        ends = _largest(32, none, lambda e: [n <= room for n, room in zip(self.count(first(e)), rooms, strict=True)])
        return [(low | tie) & ~jnp.isposinf(row) for low, tie, row in zip(less, first(ends), rows, strict=True)]

    def _rooms(self, groups: list[list[int]], free: list[Array], ties: list[Array]) -> list[Array]:
        # How many ties of each leaf go: those of the first leaf of a group first.
        tied, rooms = self.count(ties), {}
        for group, room in zip(groups, free, strict=True):
            for i in group:
                rooms[i] = jnp.clip(room, 0, tied[i])
                room = room - rooms[i]
        return [rooms[i] for i in range(len(ties))]

    def _places(self, number: int) -> UInt[Array, " _"]:
        # Index of every entry of the shard in its whole leaf.
        place = jnp.zeros((), jnp.uint32)
        for size, axes in zip(self.leaves[number], self.placement.leaves[number].dims, strict=True):
            local = size // self.placement.size(axes)
            start = lax.axis_index(axes) * local if axes else 0
            place = place[..., None] * size + (start + jnp.arange(local)).astype(jnp.uint32)
        return place


def _largest(bits: int, start: list[Array], holds: Callable[[list[Array]], list[Array]]) -> list[UInt[Array, " r"]]:
    """The largest numbers at which something holds that holds for all that are smaller."""
    one = jnp.ones((), start[0].dtype)

    def set_bit(i: Array, found: list[Array]) -> list[Array]:
        higher = [number | (one << (bits - 1 - i).astype(one.dtype)) for number in found]
        return [jnp.where(yes, new, old) for yes, new, old in zip(holds(higher), higher, found, strict=True)]

    return lax.fori_loop(0, bits, set_bit, start)
