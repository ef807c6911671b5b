"""Which units go together: a union-find that cuts axes into factors where the program asks for it."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from woodjax.structured.axes import (
    KEPT,
    Axis,
    Factor,
    Place,
    Units,
    filled,
    merged,
    plain,
    size_of,
    suffixes,
)


class Solver:
    """Units of the axes of one program.

    Attributes:
        union: Do sums of activations keep what any of their terms keeps, rather than tie them?
        cuts: For axes of leaves: sizes behind the cuts into factors.
        asked: The same of cuts that are missing: with them the program must be read once more.
    """

    def __init__(self, cuts: dict[Place, frozenset[int]], *, union: bool) -> None:
        """Start with the unit that always stays.

        Args:
            cuts: Known so far.
            union: As the attribute.
        """
        self.union: bool = union
        self.cuts: dict[Place, frozenset[int]] = cuts
        self.asked: dict[Place, set[int]] = defaultdict(set)
        self._parents = np.zeros(1, np.int64)
        self._used = 1
        self.ties: int = 0  # made so far
        self._origins: dict[int, list[tuple[Place, int, int]]] = {}  # of a root: where it stands, size behind, index
        self._sizes: dict[tuple[Place, int], int] = {}
        self._pairs: dict[tuple[int, int], int] = {}
        self.sources: dict[int, list[tuple[int, int]]] = {}  # of a root that is a union: pairs of units

    @property
    def size(self) -> int:
        """Number of units."""
        return self._used

    def fresh(self, count: int) -> Units:
        """Units that nothing ties.

        Args:
            count: How many.

        Returns:
            Their numbers.
        """
        first, self._used = self._used, self._used + count
        if self._used > len(self._parents):
            self._parents = np.concatenate([self._parents, np.zeros(self._used, np.int64)])
        self._parents[first : self._used] = np.arange(first, self._used)
        return np.arange(first, self._used)

    def leaf(self, number: int, shape: Sequence[int]) -> tuple[Axis, ...]:
        """The axes of a leaf, cut as far as is known.

        Args:
            number: Of the leaf.
            shape: Its shape.

        Returns:
            Axes of fresh units.
        """
        axes = []
        for i, size in enumerate(shape):
            place = (number, i)
            behind = [size, *sorted((cut for cut in self.cuts.get(place, ()) if 1 < cut < size), reverse=True), 1]
            factors = []
            for outer, inner in pairwise(behind):
                if outer != inner:
                    units = self.fresh(outer // inner)
                    self._sizes[place, inner] = len(units)
                    self._origins |= {int(unit): [(place, inner, index)] for index, unit in enumerate(units)}
                    factors.append(Factor(units, zero=True, places=frozenset([place])))
            axes.append(tuple(factors))
        return tuple(axes)

    def roots(self, units: Units) -> Units:
        """The root of each unit, FREE and ZERO as they are.

        Args:
            units: Numbers.

        Returns:
            Numbers; equal where units go together.
        """
        found = np.where(units >= 0, units, 0)
        while True:
            above = self._parents[found]
            if (above == found).all():
                break
            found = above
        known = units >= 0
        self._parents[units[known]] = found[known]  # shorter ways for the next time
        return np.where(known, found, units)

    def _root(self, unit: int) -> int:
        while (above := int(self._parents[unit])) != unit:
            unit = above
        return unit

    def tie(self, left: Units, right: Units) -> Units:
        """Unify units index by index.

        Args:
            left: Units.
            right: As many.

        Returns:
            What stands at each index: the unit if one of the two is FREE or ZERO.
        """
        one, other = self.roots(left), self.roots(right)
        for i in np.flatnonzero((left >= 0) & (right >= 0) & (one != other)):
            self._unify(int(one[i]), int(other[i]))
        # FREE and nothing else is FREE; what is zero in one and free in the other is the rule's to say.
        return np.where(left >= 0, left, np.where(right >= 0, right, np.maximum(left, right)))

    def _unify(self, one: int, other: int) -> None:
        root, gone = sorted((self._root(one), self._root(other)))
        if root == gone:
            return
        self._parents[gone] = root
        self.ties += 1
        if root != KEPT:
            self._origins.setdefault(root, []).extend(self._origins.get(gone, []))
        if gone in self.sources:
            found = self.sources.pop(gone)
            self.sources.setdefault(root, []).extend(found)

    def fix(self, axis: Axis) -> Axis:
        """Make all units of an axis stay.

        Args:
            axis: Its factors.

        Returns:
            The axis with all its indices stored, zeros too.
        """
        for factor in axis:
            units = factor.units[factor.units >= 0]
            self.tie(units, np.zeros_like(units))
        return filled(size_of(axis), KEPT)

    def either(self, left: Units, right: Units) -> Units:
        """Units that stay while one of two stays, index by index.

        Args:
            left: Units of a value that is zero where they are removed.
            right: The same.

        Returns:
            Units of the sum.
        """
        roots = np.stack([self.roots(left), self.roots(right)])
        found = np.max(roots, axis=0)  # ZERO and FREE are below any unit
        for i in np.flatnonzero((roots > KEPT).all(axis=0) & (roots[0] != roots[1])):
            pair = (int(roots[:, i].min()), int(roots[:, i].max()))
            if pair not in self._pairs:
                self._pairs[pair] = int(self.fresh(1)[0])
                self.sources[self._pairs[pair]] = [pair]
            found[i] = self._pairs[pair]
        return np.where((roots == KEPT).any(axis=0), KEPT, found)

    def cut(self, axis: Axis, behind: Iterable[int]) -> Axis:
        """Cut an axis into factors.

        Args:
            axis: Its factors.
            behind: Sizes of what lies behind the cuts; each divides the next larger one and the size of the axis.

        Returns:
            The same axis with cuts there, and where it had some.
        """
        parts: list[Factor] = []
        rest = size_of(axis)
        if not rest:
            return axis
        for factor in axis:
            inner = rest // factor.size
            for size in sorted((size for size in behind if inner < size < rest), reverse=True):
                if size % inner == 0 and rest % size == 0:
                    first, factor = self._split(factor, size // inner)
                    parts.append(first)
                    rest = size
            parts.append(factor)
            rest = inner
        return tuple(parts)

    def cut_at(self, axis: Axis, behind: int) -> Axis:
        """Cut an axis in two at one place; it stays whole where its factors do not allow that.

        Args:
            axis: Its factors.
            behind: Size of what lies behind the cut; it divides that of the axis.

        Returns:
            The axis with a cut there.
        """
        cut = self.cut(axis, [behind])
        if behind in (1, size_of(axis)) or behind in suffixes(cut):
            return cut
        return self.cut(self.fix(axis), [behind])

    def _split(self, factor: Factor, inner: int) -> tuple[Factor, Factor]:
        """Write a factor as a product of two, the second of `inner` indices."""
        units = self.roots(factor.units).reshape(-1, inner)
        outer = len(units)

        def both(first: Units, second: Units) -> tuple[Factor, Factor]:
            return factor._replace(units=first), factor._replace(units=second)

        if plain(factor):
            return both(factor.units[:outer], factor.units[:inner])
        if (units == units[:, :1]).all():
            return both(units[:, 0], np.zeros(inner, np.int64))
        if (units == units[:1]).all():
            return both(np.zeros(outer, np.int64), units[0])
        if self._ask(units):
            return both(self.fresh(outer), self.fresh(inner))  # the program is read once more
        whole = np.where((units < 0) & (units >= 0).any(axis=1, keepdims=True), KEPT, units)
        for row in whole:  # the rows stay or go as a whole
            self.tie(row[1:], np.full(inner - 1, row[0]))
        return both(whole[:, 0], np.zeros(inner, np.int64))

    def _ask(self, units: Units) -> bool:
        """Ask for a cut of the axes of leaves that units `[outer, inner]` come from; is that possible?"""
        inner = units.shape[1]
        found: dict[tuple[Place, int], list[tuple[int, int]]] = defaultdict(list)
        for at, unit in enumerate(units.reshape(-1)):
            for place, behind, index in self._origins.get(int(unit), []):
                found[place, behind].append((at, index))
        if not all(self._origins.get(int(unit)) for unit in units.reshape(-1)):
            return bool(self.asked)  # made anew because of another cut, or of no leaf alone
        for (place, behind), pairs in found.items():
            here, there = np.array(sorted(pairs)).T
            whole = len(here) % inner == 0 and self._sizes[place, behind] % inner == 0
            if not whole or not all(
                (part == part[0] + np.arange(inner)).all() and part[0] % inner == 0
                for part in (*here.reshape(-1, inner), *there.reshape(-1, inner))
            ):
                return False
            wanted = sorted({*self.cuts.get(place, ()), *self.asked.get(place, ()), inner * behind})
            if any(large % small for small, large in pairwise(wanted)):
                return False
        for place, behind in found:
            self.asked[place].add(inner * behind)
        return True

    def align(self, axes: Sequence[Axis]) -> list[Axis]:
        """Cut axes of one size into factors of the same sizes.

        Args:
            axes: The axes.

        Returns:
            The same axes with cuts at the same places; axes that always stay, where their cuts do not agree.
        """
        axes = [merged(axis) for axis in axes]
        size = size_of(axes[0])
        if not size:
            return [filled(0, KEPT) for _ in axes]
        behind = sorted({*(cut for axis in axes for cut in suffixes(axis)), size})
        if any(large % small for small, large in pairwise(behind)):
            return [self.fix(axis) for axis in axes]
        return [self.cut(axis, behind[:-1]) for axis in axes]

    def settle(self) -> None:
        """Know each union by the roots of its units as they are now, and unify those that became one."""
        while True:
            self.unions()
            found: dict[tuple[int, int], int] = {}
            again = False
            for pair, union in self._pairs.items():
                one, other = sorted(map(self._root, pair))
                same = found.setdefault((one, other), union)
                if self._root(same) != self._root(union):
                    self._unify(same, union)
                    again = True
            self._pairs = found
            if not again:
                return

    def unions(self) -> dict[int, frozenset[int]]:
        """For roots that are unions: the roots of which one must stay. A union of itself is tied to what it is of.

        Returns:
            Roots that are no unions; KEPT among them if one always stays.
        """
        while True:
            found, again = {}, False
            for root in list(self.sources):
                if root == KEPT or root not in self.sources:
                    continue
                ends, seen, waiting = set[int](), {root}, [root]
                while waiting:
                    for source in self.roots(np.array(self.sources[waiting.pop()]).reshape(-1)):
                        if int(source) == root:
                            again = True
                        elif int(source) in self.sources and source != KEPT:
                            if int(source) not in seen:
                                seen.add(int(source))
                                waiting.append(int(source))
                        else:
                            ends.add(int(source))
                if again:
                    pairs = self.sources.pop(root)
                    for pair in pairs:
                        for source in pair:
                            self._unify(root, source)
                    break
                found[root] = frozenset(ends)
            if not again:
                return found
